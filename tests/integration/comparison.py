"""What the tests share that compare a step with one process."""

import json
from pathlib import Path


def zero_config(name: str, folder: Path) -> str:
    """The project's config, with ZeRO-3 partitioning every parameter: by default it leaves small ones whole."""
    config = json.loads(Path(f"ds_configs/{name}.json").read_text())
    if name.startswith("zero3"):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return str(path)


def assert_equal(out: Path, name: str) -> None:
    """Of all cases that a worker wrote.  name: of what it did, for whoever reads the output."""
    for result in json.loads(out.read_text()):
        print(f"{name}: {result}")
        assert result["loss"] < 1e-5, result
        assert result["grad_norm"] < 1e-5, result
        assert result["parameters"] < 1e-5, result
        assert result["temperature"] < 1e-5, result
        assert (result["learnt"] > 1e-3) == ("learn_temperature" in result["case"]), result
