"""Write a text encoder's export for sentence-transformers, if that gives the same tokens.

sentence-transformers tokenizes prompt and text together, with all or none of the tokenizer's own tokens, and leaves the
prompt out of the mean, but not a special token at the prompt's end. So the start tokens are spelled out in the prompt,
the template's end becomes the tokenizer's end token, and a start token at the prompt's end no special token.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pipeline.models import loading, sentence_transformers
from pipeline.models.loading import reading
from pipeline.models.text_encoder.processor import Settings, TextProcessor
from pipeline.models.text_encoder.templates import TEMPLATES

# They begin in the ways that tokenizers tell apart. A token may span the prompt's end and the text's first character.
_PROBES = ("a", "A cat", "2 dogs", "été", "猫と犬", "(c)", '"So"', "-x", "...", "'s", "_", "🙂", "…", "مرحبا", "<b>")


def write(folder: Path, dimension: int, settings: Settings) -> bool:
    """Write the files beside tokenizer and config.json if texts become the same tokens; return whether they do."""
    tokenizer = loading.tokenizer(str(folder))
    ours = TextProcessor(tokenizer, 2**20, settings.instruction, settings.template)
    prompt, end, changed = str(tokenizer.decode(ours.start)), "", dict[str, Any]()
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if template := TEMPLATES.get(settings.template):
        prompt, end = prompt + template.begin + settings.instruction.lstrip(), template.end
        changed = {"eos_token": end, "add_eos_token": True, "add_bos_token": False}
    elif settings.instruction:
        prompt += settings.instruction
    elif ours.start:
        last = tokenizer.convert_ids_to_tokens(ours.start[-1])
        changed = {name: None for name, token in named.items() if token == last}
    named |= changed
    if named.get("pad_token") is None:  # as in Llama 3; which token it is changes nothing, but there must be one
        if named.get("eos_token") is None:
            return False
        changed["pad_token"] = named["eos_token"]
    with reading(folder / "tokenizer.json"):
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **changed)
    skipped = 0
    if prompt:
        ids = theirs(prompt, add_special_tokens=bool(end))["input_ids"]
        skipped = len(ids) - (ids[-1] in theirs.all_special_ids)
    for text in _PROBES:
        own = ours.tokenized(text)
        ids = theirs(prompt + text, add_special_tokens=bool(end))["input_ids"]
        if (ids, skipped) != (own.input_ids.tolist(), own.skipped):
            return False
    reads = sentence_transformers.texts(changed, special_tokens=bool(end))
    sentence_transformers.write(folder, reads, "mean", dimension, prompt, pools_prompt=False)
    return True
