"""A run's newest checkpoint -> a Hugging Face folder: `python -m pipeline.export RUN OUT`, in one process, on the CPU.

    python -m pipeline.export runs/llave_7b llave-7b
    python -m pipeline.export runs/llave_7b llave-7b-best --step best
    python -m pipeline.export runs/qwen3_vl_2b_lora qwen3-vl-2b-lora --adapters

A run that ends writes RUN/export itself. Use this program for a run that was stopped, or for another checkpoint. The
checkpoint may be of any ZeRO stage and number of processes. Adapters are merged, or with --adapters written alone, for
peft. OUT is loaded again to check that it gives the same embedding, or has the same weights.

It needs at most the CPU memory of the model (7B in bf16: 15 GB) and, for a ZeRO-3 checkpoint, of the trained parameters
in fp32 (all but the tower: 28 GB more) or, with adapters, of the weights that they are merged into (13 GB more). With
--adapters it holds the model twice.
"""

import argparse
import shutil
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import AutoModel

from pipeline.config import former, recipe_of_run
from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from pipeline.models.chunks import pack
from pipeline.models.registry import saved, training_of
from pipeline.training import checkpoint, manifest, resume
from pipeline.training.engine import adapt, freeze
from pipeline.training.export import write_adapters, write_folder
from pipeline.training.initial import resolved

_LEAST_COSINE = {"fp32": 0.99999, "bf16": 0.999}  # adapters are merged in the weights' precision


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory of pipeline.train")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist")
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N",
        help="the checkpoint after N steps, or `best`, the one with the best evaluation (default: the newest)",
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="write the adapters unmerged, in peft's format; OUT names the model that they were trained on",
    )
    arguments = parser.parse_args()
    run, out = arguments.run, arguments.out
    if out.exists():
        raise PipelineError(f"{out} is there already: name another folder, or delete it")
    if not (run / "recipe.yaml").is_file():
        raise PipelineError(f"{run} is no run directory: it has no recipe.yaml")
    folder = _checkpoint(run / "checkpoints", arguments.step)

    transformers.logging.disable_progress_bar()
    recipe = recipe_of_run(run)
    family, saved_family = training_of(recipe), saved(recipe.model.family)
    if recipe.model.path:
        source = resolved(recipe, run / "init")
    else:
        source = str(run / "init")
        manifest.check(run / "init")  # a checkpoint has no frozen weights
    began_with = former.conditions(checkpoint.conditions_of(folder))
    for name, value in family.conditions(recipe.model).items():
        if name.endswith("fingerprint") and began_with.get(name) != value:
            raise PipelineError(f"{name} is not what it was when {run} began: restore the files")
    model = family.load_whole(recipe, source).eval()
    freeze(model, recipe)
    adapt(model, recipe)
    _load_trained(model, folder)
    unverified = out.with_name(out.name + ".unverified")
    shutil.rmtree(unverified, ignore_errors=True)
    if arguments.adapters:
        write_adapters(model, recipe, source, unverified)
        _check_adapters(model, family.adapter_prefix(recipe, source), unverified)
        unverified.rename(out)
        print(f"{out}: adapters of {folder.name} of {run}; with their base model, the checkpoint's weights")
        return
    write_folder(model, dict(model.named_parameters()), recipe, source, unverified)
    count = sum(parameter.numel() for parameter in model.parameters())
    # Tokens of items as the written folder reads them.
    probe = pack(saved_family.probe(str(unverified)))
    with torch.no_grad():
        embeddings = model(probe, True)
        del model  # before the other one is loaded
        cosine = float((embeddings * saved_family.open_trained(str(unverified))(probe, True)).sum(dim=1).min())
    if cosine < _LEAST_COSINE[recipe.precision]:
        raise PipelineError(f"{unverified} does not give the checkpoint's embedding (cosine {cosine:.6f}): not for use")
    unverified.rename(out)
    print(f"{out}: {folder.name} of {run}, {count / 1e9:.2f} B parameters in {recipe.precision}, cosine {cosine:.6f}")


def _check_adapters(model: torch.nn.Module, prefix: str, folder: Path) -> None:
    """Raise PipelineError unless transformers loads the model's weights from a folder of adapters and their base."""
    dtype = next(model.parameters()).dtype
    found = dict(AutoModel.from_pretrained(folder, dtype=dtype).named_parameters())
    for name, parameter in model.named_parameters():
        theirs = found.get(name.removeprefix(prefix))
        if theirs is None or not torch.equal(theirs.float(), parameter.float()):  # peft keeps adapters in float32
            raise PipelineError(f"{folder} and its base model do not give the checkpoint's {name}: not for use")


def _load_trained(model: torch.nn.Module, folder: Path) -> None:
    """Load a checkpoint's trained weights into the model. PipelineError unless they are the trained parameters."""
    weights = checkpoint.trained_weights(folder)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if differing := sorted(trained ^ weights.keys()):
        raise PipelineError(f"{folder} does not hold what the recipe trains: {differing[0]} is in only one of them")
    model.load_state_dict(weights, strict=False)


def _step(text: str) -> int | Literal["best"]:
    return "best" if text == "best" else int(text)


def _checkpoint(folder: Path, step: int | Literal["best"] | None) -> Path:
    if step is None:
        found = resume.whole(folder, thorough=True)
    else:
        found = checkpoint.best(folder) if step == "best" else folder / f"step-{step:08d}"
    there = ", ".join(str(checkpoint.step_of(path)) for path in reversed(checkpoint.candidates(folder))) or "none"
    if found is None or not found.is_dir():
        raise PipelineError(f"no such checkpoint in {folder}; steps that have one: {there}")
    if step is not None and (fault := resume.fault_of(found, thorough=True)):
        raise PipelineError(f"{found} is damaged: {fault}; steps that have a checkpoint: {there}")
    return found


if __name__ == "__main__":
    main()
