"""Chat templates around the texts of a text encoder, as in LLM2CLIP's published code (arXiv 2411.04997).

The text and the template's end are tokenized once by themselves; as many last tokens of the whole are pooled. So the
end is pooled, and the template's beginning and the instruction are not.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Template:
    """The strings before and after a text. An instruction stands between `begin` and the text.

    special: the tokens among them, which the tokenizer must have.
    """

    begin: str
    end: str
    special: tuple[str, ...]

    def tokenized(self, tokenizer: Tokenizer, instruction: str, text: str) -> tuple[list[int], int]:
        """Return the token ids, without the tokenizer's start tokens, and how many of the last are pooled; 0 is all.

        White space at the text's end is removed. That at its beginning stays: the published code strips instruction
        and text together, and a separator stands before the text. Tokens can merge where the text begins; then the
        pooled part begins a token earlier or later than the text. Separators in the text itself are removed, and as
        many last tokens are pooled as the part before the first one has.
        """
        own, *others = (text.rstrip() + self.end).split(SEPARATOR)
        whole, alone = (
            tokenizer(each, add_special_tokens=False)["input_ids"]
            for each in ("".join((self.begin + instruction.lstrip(), own, *others)), own)
        )
        return whole, len(alone)


SEPARATOR = "!@#$%^&*()"  # in the published code between instruction and text
NONE = "none"  # instruction and text are tokenized apart, without more around them
TEMPLATES = {
    "llama3": Template(
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    )
}


def check(name: str, tokenizer: Tokenizer, where: str) -> None:
    """Raise PipelineError if a tokenizer lacks a template's special tokens.  where: its folder or hub name."""
    if (template := TEMPLATES.get(name)) is None:
        return
    known = tokenizer.get_vocab()
    if missing := [token for token in template.special if token not in known]:
        raise PipelineError(
            f"{where}: its tokenizer has no {missing[0]}, which the template {name} needs: set model.template=none, or "
            "name a model whose tokenizer has it, such as Llama-3-Instruct"
        )
