"""Recipes that mean harm, made in families: `RECIPES[name]` is the bytes of one, and where it is wrong, a sentence's part.

`LOADED` are those with nothing wrong in the file itself: what they name cannot be, and a plan says so.
"""

from __future__ import annotations

REST = "passes: [{quantize_matmul: {bits: 4}}]\n"
MODEL = "model: ./model\n"
TAGS = ("int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs", "merge", "value", "yaml")
BIG = 300_000
RECIPES: dict[str, tuple[bytes, str]] = {}
LOADED: dict[str, tuple[bytes, str]] = {}


def family(name: str, message: str, texts: dict[str, str], into: dict[str, tuple[bytes, str]] = RECIPES) -> None:
    """Register texts that are refused with the same sentence."""
    for case, text in texts.items():
        into[f"{name} {case}"] = text.encode("utf-8", "surrogatepass"), message


def number(value: str) -> str:
    """A recipe with a number of windows."""
    return f"{MODEL}{REST}validate: {{windows: {value}}}\n"


def gate(value: str) -> str:
    """A recipe with a gate."""
    return f"{MODEL}{REST}validate: {{max_kl_divergence: {value}}}\n"


family("tag", "", {tag: number(f"!!{tag} abc") for tag in TAGS})
family("tag of nothing", "", {tag: number(f'!!{tag} ""') for tag in TAGS[:5]})
family(
    "tag that runs code",
    "is not supported",
    {
        kind: f"model: !!python/{kind} [touch ran]\n{REST}"
        for kind in (
            "object/apply:os.system",
            "object/new:os.mkdir",
            "object:os.system",
            "name:os.system",
            "module:os",
            "tuple",
        )
    },
)
family(
    "digits",
    "cannot be read as int|too large a number|text in YAML",
    {
        "decimal": number("9" * 4001),
        "too many": number("9" * 4096),
        "hexadecimal": number("0x" + "f" * 4000),
        "binary": number("0b" + "1" * 4000),
        "of a seed": MODEL + REST + f"calibrate: {{seed: {1 << 63}}}",
        "exponent": number("1e400"),
        "negative": number("-" + "9" * 4000),
    },
)
family("gate", "finite number", {v: gate(v) for v in (".inf", "-.inf", ".nan", ".NaN", "+.Inf", "1.0e+999", "-1.0e+999")})
family(
    "wrong type",
    "windows is|'windows'|expected|means",
    {v: number(v) for v in ("[1]", "{a: 1}", "~", "yes", "'1'", "1.5", "2020-01-01")},
)
family(
    "unseen character",
    "cannot be seen|special characters|not YAML",
    {
        f"{place} {ord(c):x}": text.replace("@", escaped)
        for c, escaped in {"\0": "\\0", "\x1b": "\\e", "\x7f": "\\x7f", "\x9b": "\\x9b", "\ud800": "\\ud800"}.items()
        for place, text in {
            "model": f'model: "./a@b"\n{REST}',
            "pass": f'{MODEL}passes: ["a@.b"]\n',
            "key": f'{MODEL}"@": 1\n{REST}',
            "text": f'{MODEL}{REST}validate: {{text: "a@"}}\n',
        }.items()
    },
)
family(
    "raw",
    "not YAML|cannot be read",
    {
        "nul": "model: \0\n",
        "escape": "model: \x1b[2J\n",
        "beyond unicode": 'model: "\\UFFFFFFFF"\n',
        "two documents": "a: b\n---\nc: d\n",
        "version": "%YAML 9.9\n---\nmodel: x\n",
        "tab": "model:\tx\n\t- a\n",
        "open": "model: [",
        "quote": "model: 'a",
        "surrogate": "model: \ud800",
    },
)
family(
    "markup",
    r"\[/b\]",
    {
        "section": f"{MODEL}{REST}'[/b]': 1\n",
        "pass": f"{MODEL}passes: ['[/b]']\n",
        "option": f"{MODEL}passes: [{{quantize_matmul: {{'[/b]': 1}}}}]\n",
        "method": f"{MODEL}passes: [{{quantize_matmul: {{bits: 4, method: '[/b]'}}}}]\n",
        "target": f"{MODEL}{REST}convert: {{target: '[/b]'}}\n",
    },
)
family(
    "twice",
    "is here twice",
    {
        "section": f"{MODEL}{MODEL}{REST}",
        "option": gate("1.0, max_kl_divergence: 2.0"),
        "quoted": f"{MODEL}'model': x\n{REST}",
    },
)
family(
    "key",
    "a key must be plain text",
    {k: f"{MODEL}{REST}? {k}\n: 1\n" for k in ("[a]", "{a: b}", "~", "1", "1.5", "yes", "2020-01-01", "<<")},
)
family(
    "anchor",
    "anchors and aliases",
    {
        "bomb": "a: &a [x, x]\nb: &b [*a, *a]\nmodel: *b\n",
        "itself": "model: &a [*a]\n",
        "unused": f"model: &a ./model\n{REST}",
        "merged": f"model: &m {{source: x}}\nexport: {{<<: *m}}\n{REST}",
        "of a key": f"&k model: x\n{REST}",
    },
)
family(
    "deep",
    "nested too deeply",
    {
        "lists": "[" * BIG,
        "mappings": "{" * BIG,
        "pairs": "[{" * BIG,
        "keys": "? " * BIG,
        "dashes": "- " * BIG,
        "closed": "[" * 21 + "]" * 21,
    },
)
family(
    "many",
    "more than 10,000 values",
    {
        "in a line": "model: [" + "a," * BIG + "]\n",
        "in lines": "passes:\n" + "- a\n" * 200_000,
        "keys": "{" + ",".join(f"k{i}" for i in range(BIG // 4)) + "}",
        "empty": "[" + "[]," * BIG + "]",
        "nulls": "model:\n" + "  -\n" * 200_000,
    },
)
family(
    "long",
    "larger than 1 MiB|characters; 4,096 are read",
    {
        "comment": "# " + "x" * (2 << 20),
        "text": f"model: {'x' * BIG}\n{REST}",
        "name": f"{MODEL}passes: [{'a.' * 3000}b]\n",
        "folded": "model: >\n" + " a\n" * 200_000,
        "escapes": 'model: "' + "\\x41" * 200_000 + '"\n',
        "key": f"{MODEL}? {'k' * 5000}\n: 1\n",
    },
)
family(
    "module",
    "cannot be the name of|there is no|must define one|not trusted",
    {
        name: f"{MODEL}passes: ['{name}']\n"
        for name in (
            "os.path",
            "this",
            "antigravity.x",
            "..",
            "a..b",
            ".a",
            "a.",
            "__main__",
            "lowbit.__main__",
            "builtins.x",
            "a/b.c",
            "sys.exit",
            "passes.x",
            "lowbit.pipeline.commands.measure_worker",
            "class.def",
            "tests",
            "json.tool",
        )
    },
)
family(
    "shape",
    "a recipe is a mapping|is required|passes must be|an entry of passes|takes options",
    {
        "nothing": "",
        "null": "~",
        "text": "x",
        "list": "[]",
        "number": "3",
        "no passes": MODEL,
        "no model": REST,
        "passes of text": MODEL + "passes: x",
        "empty": MODEL + "passes: []",
        "two names": MODEL + "passes: [{a: 1, b: 2}]",
        "list of lists": MODEL + "passes: [[]]",
        "options": MODEL + "passes: [{quantize_matmul: [1]}]",
        "convert": MODEL + REST + "convert: [[]]",
        "model": "model: [a]\n" + REST,
    },
)
RECIPES["bytes utf-16"] = f"{MODEL}{REST}".encode("utf-16"), "cannot be read"
RECIPES["bytes latin-1"] = "model: ./modèle\n".encode("latin-1"), "cannot be read"
RECIPES["bytes random"] = bytes(range(256)), "cannot be read"

family(
    "model",
    "",
    {
        "of nobody": f"model: ~nobody-at-all/x\n{REST}",
        "too long": f"model: ./{'x' * 300}\n{REST}",
        "markup": f"model: './[/b]'\n{REST}",
        "device": f"model: /dev/null\n{REST}",
        "recipe itself": f"model: ./mine.yaml\n{REST}",
        "above all": f"model: {'../' * 900}x\n{REST}",
        "hub": f"model: '[/b]/[/b]'\n{REST}",
        "revision": f"model: {{source: a/b, revision: ../../x}}\n{REST}",
        "onnx": f"model: ./no.onnx\n{REST}",
    },
    LOADED,
)
