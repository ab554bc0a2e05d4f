"Griffe extension: the comments on a function's arguments become its list of parameters, as nbdev shows them."

import re
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[2]


def comment_of(line: str) -> str:
    "What stands behind the argument on `line`; a `#` within a string is none"
    found = re.search(r"""^(?:[^#'"]|'[^']*'|"[^"]*")*?#\s?(.*)$""", line)
    return found[1].strip() if found else ""


def signature_lines(func: griffe.Function) -> list[str]:
    "The source of `func` up to its body"
    lines = func.source.splitlines()
    start = next((i for i, line in enumerate(lines) if re.match(r"\s*(async )?def ", line)), 0)
    depth = 0
    for end, line in enumerate(lines[start:], start):
        code = re.sub(r"""'[^']*'|"[^"]*"|#.*""", "", line)
        depth += sum(code.count(c) for c in "([{") - sum(code.count(c) for c in ")]}")
        if depth <= 0:
            return lines[start : end + 1]
    return lines[start : start + 1]


def documented(func: griffe.Function) -> str:
    "The comments of `func` as sections of a docstring in Google's style"
    lines, parameters = signature_lines(func), []
    for parameter in func.parameters:
        argument = re.compile(rf"^\s*\*{{0,2}}{re.escape(parameter.name.lstrip('*'))}\s*[:=,]")
        comment = next((comment_of(line) for line in lines[1:] if argument.match(line)), "")
        if comment:
            parameters.append(f"    {parameter.name}: {comment}")
    text = "\n\nParameters:\n" + "\n".join(parameters) if parameters else ""
    end = re.match(r"\s*\)\s*->.*?:\s*#\s?(.+)$", lines[-1]) if len(lines) > 1 else None
    return text + (f"\n\nReturns:\n    {end[1].strip()}" if end else "")


def decorators(func: griffe.Function) -> list[str]:
    return [str(d.value) for d in func.decorators]


def whose(func: griffe.Function) -> str:
    "Of which class `func` is made a method or property, if fastcore's `patch` does that"
    patched = next((d for d in decorators(func) if re.match(r"patch\b", d)), None)
    if patched is None or not len(func.parameters):
        return ""
    what = "property" if "as_prop=True" in patched else "method"
    return f"\n\nA {what} of `{func.parameters[0].annotation}`."


def linked(name: str) -> str:
    "A class or function by its name, as a link if it is on one of the pages"
    defined = re.compile(rf"^(?:class|def) {re.escape(name)}\b", re.M)
    of = (p.stem for p in sorted((ROOT / "fastsb").glob("*.py")) if defined.search(p.read_text(encoding="utf-8")))
    module = next(of, None)
    return f"`{name}`" if module is None else f"[`{name}`][fastsb.{module}.{name}]"


def delegated(func: griffe.Function) -> str:
    "To whom `**kwargs` go"
    to = next((m[1] for d in decorators(func) if (m := re.match(r"delegates\(([\w.]+)", d))), None)
    return f"\n\nFurther arguments are those of {linked(to.removesuffix('.__init__'))}." if to else ""


class Docments(griffe.Extension):
    "Adds to each docstring what the comments in the signature say"

    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        text = whose(func) + delegated(func) + documented(func)
        if not text:
            return
        if func.docstring:
            func.docstring.value += text
        else:
            how = dict(parser="google", parser_options={"warn_missing_types": False})
            func.docstring = griffe.Docstring(text, parent=func, **how)
