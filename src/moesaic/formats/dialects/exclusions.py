"""Which modules a list in a quantization_config means. There are four spellings of the list, and more of its entries.

An entry is a name, a wildcard (`*`, `?`, `[`), or a regular expression (`re:` before it, or signs that only one has).
Names may lack `model.`, and may be those of fused modules that no checkpoint holds (`qkv_proj`, `gate_up_proj`);
wildcards and expressions mean such modules only where they spell them out.

- loose (fp8, mxfp4, ModelOpt): a name stands for itself and everything inside it, `self_attn` for all of them;
  component by component, so that `layers.1` is not `layers.11` and `mlp.gate` is not `mlp.gate_proj`.
- strict (compressed-tensors): a name is one module, or a class of them: `Linear`. Expressions match from the start.

Lists can be long and experts many, so entries that cannot tell experts apart are asked once per layer.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from moesaic.errors import CheckpointError, UnsupportedError

Found = tuple[int, ...]
"""Indices of the entries that match, ascending."""

_FUSED = {
    "q_proj": ("qkv_proj",), "k_proj": ("qkv_proj",), "v_proj": ("qkv_proj",),
    "gate_proj": ("gate_up_proj",), "up_proj": ("gate_up_proj",), "w1": ("w13",), "w3": ("w13",),
    "q_a_proj": ("fused_qkv_a_proj_with_mqa", "fused_qkv_a_proj"),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj_with_mqa", "fused_qkv_a_proj"),
}  # fmt: skip
_FUSED_SIGNS = ("qkv", "gate_up", "w13")
_REGEX_ONLY = re.compile(r"[\\()|^$+{]")
_LAYER = re.compile(r"layers\.\d+")
_LONGEST, _REPEATS = 500, 6


class Entries:
    """A list, compiled. where: the field that it stands in, for errors."""

    def __init__(self, entries: Sequence[str] = (), *, strict: bool = False, where: str = "") -> None:
        self.entries, self.where = tuple(entries), where
        one_by_one = [i for i, entry in enumerate(self.entries) if _tells_experts_apart(entry)]
        alike = sorted(set(range(len(self.entries))) - set(one_by_one))
        self._alike = _Matcher(self, alike, strict)
        self._one_by_one = _Matcher(self, one_by_one, strict)

    def find(self, name: str, *classes: str) -> Found:
        """name: of one module.  classes: what else a strict entry may call it."""
        names = aliases(name)
        return tuple(sorted(self._alike.find(names, classes) | self._one_by_one.find(names, classes)))

    def find_experts(self, template: str, count: int, *classes: str) -> Iterator[Found]:
        """The same for each of the experts, whose number stands at `{e}` in the template."""
        alike = self._alike.find(aliases(template.format(e=0), expert=True), classes)
        for e in range(count):
            own = self._one_by_one.find(aliases(template.format(e=e), expert=True)) if self._one_by_one else set()
            yield tuple(sorted(alike | own))

    def __len__(self) -> int:
        return len(self.entries)


class _Matcher:
    def __init__(self, owner: Entries, indices: Iterable[int], strict: bool) -> None:
        self.strict, self.count = strict, 0
        self.exact: dict[str, list[int]] = defaultdict(list)
        self.inside: dict[str, list[int]] = defaultdict(list)
        self.patterns: dict[str, list[tuple[int, re.Pattern[str], bool]]] = defaultdict(list)
        for i in indices:
            self.count += 1
            self._add(i, owner.entries[i], owner.where)

    def __bool__(self) -> bool:
        return self.count > 0

    def _add(self, index: int, entry: str, where: str) -> None:
        if pattern := _pattern(entry, where, self.strict):
            layer = None if _is_regex(entry) else re.match(r"(?:model\.)?(layers\.\d+)\.", entry)
            fused = any(sign in entry for sign in _FUSED_SIGNS)
            self.patterns[layer.group(1) if layer else ""].append((index, pattern, fused))
        else:
            name = entry.strip(".").removesuffix(".weight")
            anchored = self.strict or name.startswith("model.")
            (self.exact if anchored else self.inside)[name.removeprefix("model.")].append(index)

    def find(self, names: tuple[str, ...], classes: tuple[str, ...] = ()) -> set[int]:
        """names: of one module, its own first."""
        found = {i for each in classes for i in self.exact.get(each, ())} if self.strict else set()
        for name in names:
            short = name.removeprefix("model.")
            for start in (short,) if self.strict else _starts(short):
                found.update(self.exact.get(start, ()))
            if self.inside:
                dotted = f".{name}."
                found.update(i for entry, which in self.inside.items() if f".{entry}." in dotted for i in which)
        layer = _LAYER.match(names[0].removeprefix("model.")) if self.patterns else None
        for bucket in ("", layer.group()) if layer else ("",):
            for i, pattern, fused in self.patterns.get(bucket, ()):
                if any(_matches(pattern, name) for name in (names if fused else names[:1])):
                    found.add(i)
        return found


def _matches(pattern: re.Pattern[str], name: str) -> bool:
    if pattern.match(name):
        return True
    if pattern.pattern.startswith(".*"):  # what it finds in a part of the name, it finds in all of it
        return False
    return bool(pattern.match(name.removeprefix("model.")))


def aliases(name: str, *, expert: bool = False) -> tuple[str, ...]:
    """A module's name, and those of the fused modules that hold it."""
    base, _, last = name.rpartition(".")
    fused = _FUSED.get(last, ())
    found = [name, *(f"{base}.{each}" for each in fused)]
    if expert:  # all experts as one module, as kernels and newer libraries have them
        together = base.rpartition(".")[0]
        found += [together, *(f"{together}.{each}" for each in (last, *fused))]
    return tuple(found)


def _starts(name: str) -> Iterator[str]:
    """a.b.c -> a.b.c, a.b, a."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _pattern(entry: str, where: str, strict: bool) -> re.Pattern[str] | None:
    """The expression for an entry that is not a plain name."""
    if entry.startswith("re:"):
        return _compile(entry[3:], entry, where)
    if strict:
        return None
    if _REGEX_ONLY.search(entry):
        return _compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", entry, where, entry)
    if any(sign in entry for sign in "*?["):
        return re.compile(f"{fnmatch.translate(entry)}|{fnmatch.translate(f'{entry}.*')}")
    return None


def _compile(regex: str, entry: str, where: str, judged: str | None = None) -> re.Pattern[str]:
    """Expressions come with checkpoints, which are untrusted: those that can take exponential time are refused."""
    text = judged if judged is not None else regex
    nested = re.search(r"\)(?:[*+]|\{)", text)
    if nested or len(text) > _LONGEST or len(re.findall(r"[*+]", text)) > _REPEATS:
        raise UnsupportedError(
            f"the expression {entry!r:.80} repeats a group, or repeats too much", where=where,
            remedy="Write it with plain `.*`, or name the modules.",
        )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python will read otherwise
            return re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"the expression {entry!r:.80} is not valid: {error}", where=where,
            remedy="Restore the file from the model's original repository.",
        ) from error  # fmt: skip


def _tells_experts_apart(entry: str) -> bool:
    """Whether an entry may mean some experts of a layer and not others. In doubt yes: that only costs time."""
    return _is_regex(entry) or bool(re.search(r"[\d?\[]", _LAYER.sub("", entry)))


def _is_regex(entry: str) -> bool:
    return entry.startswith("re:") or bool(_REGEX_ONLY.search(entry))
