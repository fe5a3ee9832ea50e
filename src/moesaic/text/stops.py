"""Stop strings over a stream of text."""

from __future__ import annotations


class _Matcher:
    """Knuth-Morris-Pratt: how much of one stop string the text so far ends with. O(1) amortised per character."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        self._fallback = [0] * len(pattern)  # [i]: the longest proper border of pattern[: i + 1]
        border = 0
        for i in range(1, len(pattern)):
            while border and pattern[i] != pattern[border]:
                border = self._fallback[border - 1]
            border += pattern[i] == pattern[border]
            self._fallback[i] = border

    def step(self, char: str) -> bool:
        """Advance by one character; True when the stop string ends here."""
        while self.matched and char != self.pattern[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += char == self.pattern[self.matched]
        if self.matched < len(self.pattern):
            return False
        self.matched = self._fallback[-1]
        return True


class StopChecker:
    """Passes text through until a stop string appears in it.

    The stop string that *ends* first wins (of two that end together, the longer): what comes out does not depend
    on how the text was cut into pieces. Only the longest suffix that could still become a stop string is held back,
    and nothing at all when the stop string is to be included.
    """

    def __init__(self, stop: tuple[str, ...], include_stop: bool) -> None:
        if not all(stop):
            raise ValueError("a stop string must not be empty")
        # Longest first, so that the first to match at a position is the longest.
        self._matchers = [_Matcher(pattern) for pattern in sorted(set(stop), key=len, reverse=True)]
        self._include = include_stop
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str, active: bool = True) -> tuple[str, str | None]:
        """Add text; returns what may be shown now, and the stop string if one has ended the text.

        While not `active` (fewer than min_tokens so far) a stop string that ends in `text` is ordinary text, but one
        may begin there and end later. After a hit every call returns ("", hit).
        """
        if self.hit is not None or not self._matchers:
            return ("" if self.hit else text), self.hit
        total = self._held + text
        for i, char in enumerate(text, start=len(self._held) + 1):
            ended = [matcher.pattern for matcher in self._matchers if matcher.step(char)]
            if ended and active:
                self.hit, self._held = ended[0], ""
                return total[: i if self._include else i - len(ended[0])], self.hit
        keep = 0 if self._include else max(matcher.matched for matcher in self._matchers)
        self._held = total[len(total) - keep :]
        return total[: len(total) - keep], None

    def flush(self) -> str:
        """The text ended without a stop string: returns what was held back."""
        held, self._held = self._held, ""
        return held
