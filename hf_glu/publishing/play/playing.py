"""What the page plays with: a model, what may stand beside it, and presets; each setting gives all that is shown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_glu.errors import DataError, OptionError
from hf_glu.publishing.modulations import GateModulation
from hf_glu.publishing.play.reading import SHOWN, Player, TextGates, difference
from hf_glu.publishing.play.settings import PlaySettings
from hf_glu.publishing.play.tables import Shades, difference_html, figures_html, reading_html

NOTHING, AS_IT_IS, ALIKE = "nothing", "{} as it is", "{}, steered alike"
EXPORTED = "play.safetensors"


@dataclass(frozen=True, kw_only=True)
class Played:
    """What one setting gives, as HTML and as code: the model as it is set, what is beside it, and the difference."""

    figures: str
    model: str
    beside: str
    difference: str
    code: str


class Playground:
    """A model to play with.

    Args:
        source: local folder, GGUF file or Hub id.
        compare: another model that stands beside it; None: none.
        modulations: folders, files or repositories of presets.

    Raises:
        CheckpointError: a model, its tokenizer or a modulation can't be loaded.
        NoSiteError: a model has no gates.
        OptionError: a modulation is of another model, or two have one name.
    """

    def __init__(self, source: str, compare: str | None = None, modulations: Sequence[str] = ()) -> None:
        self.presets: dict[str, GateModulation] = {}
        self.sources: dict[str, str] = {}
        for given in modulations:
            self._add(given)
        self.player = Player(source)
        for preset in self.presets.values():
            preset.check(self.player.model)
        self.other = None if compare is None else Player(compare)
        self.name = _short(source)
        self.other_name = None if compare is None else _short(compare)
        if self.name == self.other_name:
            self.name, self.other_name = source, compare
        self.choices = self._choices()

    def _add(self, source: str) -> None:
        name = _short(source).removesuffix(".safetensors")
        if name in self.presets:
            raise OptionError(f"two modulations are called {name}: rename one")
        self.presets[name], self.sources[name] = GateModulation.load(source), source

    def _choices(self) -> dict[str, tuple[Player, bool] | None]:
        """Return what may stand beside the model, the usual one first: which, and whether it is steered."""
        found: dict[str, tuple[Player, bool] | None] = {}
        if self.other is not None and self.other_name is not None:
            found[AS_IT_IS.format(self.other_name)] = self.other, False
            if self._fits(self.other):
                found[ALIKE.format(self.other_name)] = self.other, True
        found[AS_IT_IS.format(self.name)] = self.player, False
        return found | {NOTHING: None}

    def _fits(self, other: Player) -> bool:
        """Return whether the other model has the gates of this one, so that a modulation of the one is of the other."""
        hand = PlaySettings(threshold=1.0).modulation(self.player.model, {})
        try:
            for each in ([hand] if hand else []) + list(self.presets.values()):
                each.check(other.model)
        except OptionError:
            return False
        return hand is not None

    @property
    def measures(self) -> list[str]:
        """Which measures the gates of any of the models have."""
        players = [self.player] + ([self.other] if self.other else [])
        return list(SHOWN if any(player.remembers for player in players) else SHOWN[:1])

    def show(
        self, text: str, settings: PlaySettings, *, new_tokens: int = 0, beside: str = NOTHING, measure: str = SHOWN[0]
    ) -> Played:
        """Return what is shown of one text.

        Raises:
            DataError: the text is empty.
            OptionError: there is no such choice.
        """
        if not text.strip():
            raise DataError("type a text that the model reads")
        if beside not in self.choices:
            raise OptionError(f"nothing called {beside!r} can stand beside the model")
        steered = settings.modulation(self.player.model, self.presets)
        main = self.player.read(text, new_tokens=new_tokens, steered=steered)
        chosen = self.choices[beside]
        other: TextGates | None = None
        if chosen is not None:
            again = steered if chosen[1] else None
            alike = chosen[0] is self.player and again is steered  # which it has just read
            other = main if alike else chosen[0].read(text, new_tokens=new_tokens, steered=again)
        parts = [] if other is None else difference(other, main)
        names = [self._named(self.player, steered is not None)]
        if chosen is not None:
            names.append(self._named(chosen[0], chosen[1] and steered is not None))
        reads = [main] + ([other] if other else [])
        scale = Shades.of(reads, measure)
        return Played(
            figures=figures_html(reads, names, parts),
            model=reading_html(main, names[0], measure, scale),
            beside="" if other is None else reading_html(other, names[1], measure, scale),
            difference="" if other is None else difference_html(parts, measure, names[1], names[0]),
            code=settings.code(self.player.layers, EXPORTED, self.sources),
        )

    def _named(self, player: Player, steered: bool) -> str:
        name = self.name if player is self.player else str(self.other_name)
        return f"{name}, steered" if steered else name

    def export(self, settings: PlaySettings) -> bytes | None:
        """Return the settings as a file that `GateModulation.load` reads, None where nothing is steered."""
        steered = settings.modulation(self.player.model, self.presets)
        return None if steered is None else steered.to_bytes()

    def export_html(self, settings: PlaySettings) -> str:
        """Return a link to that file, which holds it: nothing is written on this side."""
        content = self.export(settings)
        if content is None:
            return '<div class="play"><p>Nothing is steered: move a slider first.</p></div>'
        data = base64.b64encode(content).decode()
        link = f'<a download="{EXPORTED}" href="data:application/octet-stream;base64,{data}">{EXPORTED}</a>'
        return f'<div class="play"><p>{link}, {len(content):,} bytes</p></div>'


def _short(source: str) -> str:
    """Return a model's name as the page shows it: of a path its end, of a repository all of it."""
    path = Path(source)
    return path.resolve().name if path.exists() else source
