"""An engine's tokenizer and chat template against the checkpoint's: the same ids, the same text, or an example that differs."""

from __future__ import annotations

from tokenizers import Tokenizer

from lowbit.pipeline.checkpoint.chat_template import CONVERSATIONS, ChatRenderer, TemplateRefusal, chat_template
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.report.engine_quality import TemplateMatch, TokenizerMatch

TEXTS = (
    "Hello world. It's 12345 o'clock; they'll pay $3.50 (or 99%)!",
    "  two  spaces,\ttabs\nand\r\nlines\n\n",
    "def f(x):\n    return x ** 2  # comment\n",
    "\\begin{equation} \\sum_{i=1}^n x_i^2 \\le 10^{-3} \\end{equation}",
    "naïve café Ångström Straße İstanbul",
    "cafe\u0301 A\u030angstro\u0308m e\u0323\u0301",
    "你好\uff0c世界。请用中文写一首关于秋天的诗。",
    "こんにちは、カタカナ。안녕하세요 \u1112\u1161\u11ab",
    "مرحبا بالعالم، שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "👩\u200d👩\u200d👧\u200d👦 🇩🇪 👍🏽 🙂",
    "\u00a0\u2003\u3000odd\u2028spaces\u200b",
    "ǅ ﬁ ½ Ⅷ ① \U0001d518\U0001d52b\U0001d526",
    "control \x02'll \x7f characters",
    "a" * 200,
)
"""Scripts, joiners, combining marks, odd spaces, and what special tokens' rules trip over."""


def compare_ids(found: list[list[int]], tokenizer: Tokenizer) -> TokenizerMatch:
    """How many of TEXTS got the ids of the checkpoint's tokenizer, and the first that did not.

    Args:
        found: what the engine's tokenizer made of each of TEXTS.
    """
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    different = [text for text, ours, theirs in zip(TEXTS, expected, found, strict=True) if ours != theirs]
    example = different[0] if different else None
    return TokenizerMatch(texts=len(TEXTS), equal=len(TEXTS) - len(different), example=example)


def compare_chats(engine: str, found: list[str | None], checkpoint: Checkpoint) -> TemplateMatch | None:
    """How many of CONVERSATIONS `engine` renders as transformers does, and the first that it does not; None without a template.

    A conversation that the template refuses (a role that it does not know) does not count.

    Args:
        found: what the engine made of each of CONVERSATIONS; None where it refused.
    """
    if not (template := chat_template(checkpoint)):
        return None
    renderer = ChatRenderer(checkpoint, template)
    counted, different = 0, []
    for conversation, theirs in zip(CONVERSATIONS, found, strict=True):
        try:
            ours = renderer.render(conversation)
        except TemplateRefusal:
            continue
        counted += 1
        if ours != theirs:
            wrote = "refuses it" if theirs is None else f"writes {theirs[:200]!r}"
            different.append(f"{engine} {wrote}, transformers {ours[:200]!r}")
    example = different[0] if different else None
    return TemplateMatch(conversations=counted, equal=counted - len(different), example=example)
