"""The page, made by gradio: controls, and beside or below them what the model's gates do.

It asks for nothing that isn't on the server: fonts are the system's, and gradio's analytics are off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_glu.config.extras import need
from hf_glu.errors import HfGluError
from hf_glu.publishing.play.playing import Playground
from hf_glu.publishing.play.reading import MAX_NEW
from hf_glu.publishing.play.settings import PlaySettings
from hf_glu.publishing.play.tables import CSS

if TYPE_CHECKING:
    from gradio import Blocks

TEXT = "The film was not at all as bad as they said."
NEW_TOKENS = 12
THRESHOLDS, SLOPES, STRENGTHS = (-2.0, 2.0, 0.05), (0.25, 4.0, 0.05), (-3.0, 3.0, 0.1)
FONT, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
SAVE = "() => document.querySelector('#exported a')?.click()"
STYLE = """
.gradio-container { max-width: 1500px !important; padding: 0.8rem !important; }
.gradio-container h1 { font-size: 1.3rem; margin: 0.2rem 0; overflow-wrap: anywhere; }
footer { display: none !important; }
@media (max-width: 640px) { .gradio-container .app { padding: 0.3rem !important; } }
"""


def build_page(ground: Playground) -> Blocks:
    """Return the page of a playground; `looks` has what it is launched with.

    Raises:
        MissingPackageError: gradio isn't installed.
    """
    need("gradio", what="the page")
    import gradio

    with gradio.Blocks(title=f"{ground.name}: gates", analytics_enabled=False, fill_width=True) as page:
        gradio.Markdown(f"# {ground.name}", elem_id="title")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                controls = _Controls(gradio, ground)
            with gradio.Column(scale=5, min_width=300):
                shown = _results(gradio)
        _wire(gradio, page, ground, controls, shown)
    return page


def looks() -> dict[str, Any]:
    """Return what the page is launched with: style, and nothing that is kept or comes from elsewhere."""
    import gradio

    theme = gradio.themes.Default(font=FONT, font_mono=MONO)
    return {"theme": theme, "css": CSS + STYLE, "footer_links": [], "run_history": False, "quiet": True,
            "share": False, "ssr_mode": False, "mcp_server": False, "enable_monitoring": False}  # fmt: skip


class _Controls:
    """The controls of the page, in the order in which `read` is given their values."""

    def __init__(self, gradio: Any, ground: Playground) -> None:
        self.ground, player = ground, ground.player
        self.parts: dict[str, Any] = {}
        self.parts["text"] = gradio.Textbox(TEXT, label="Text", lines=3, max_lines=8, elem_id="text")
        if player.writes:
            self.parts["new_tokens"] = gradio.Slider(0, MAX_NEW, NEW_TOKENS, step=1, label="Tokens to write")
        if player.layers:
            self._by_hand(gradio, player.layers)
        else:
            gradio.Markdown("Its gates are inside of experts, which this page shows, and doesn't steer.")
        for name in ground.presets:
            self.parts[f"preset {name}"] = _slider(gradio, STRENGTHS, 0.0, f"Strength of {name}")
        first = next(iter(ground.choices))
        self.parts["beside"] = gradio.Radio(list(ground.choices), value=first, label="Beside it", elem_id="beside")
        if len(ground.measures) > 1:
            self.parts["measure"] = gradio.Radio(ground.measures, value=ground.measures[0], label="Show")
        with gradio.Row():
            self.run = gradio.Button("Run", variant="primary", min_width=80, elem_id="run")
            self.reset = gradio.Button("Reset", min_width=80, elem_id="reset")
            self.export = gradio.Button("Export", min_width=80, elem_id="export")
        self.exported = gradio.HTML(padding=False, elem_id="exported")

    def _by_hand(self, gradio: Any, layers: int) -> None:
        self.parts["threshold"] = _slider(gradio, THRESHOLDS, 0.0, "Threshold")
        self.parts["slope"] = _slider(gradio, SLOPES, 1.0, "Slope")
        if layers > 1:
            self.parts["first"] = _slider(gradio, (0, layers - 1, 1), 0, "From layer")
            self.parts["last"] = _slider(gradio, (0, layers - 1, 1), layers - 1, "To layer")

    @property
    def moved(self) -> list[str]:
        """The names of the controls that steer."""
        return [name for name in self.parts if name not in ("text", "new_tokens", "beside", "measure")]

    def read(self, values: tuple[Any, ...]) -> tuple[PlaySettings, dict[str, Any]]:
        """Return the settings, and what else was asked for, of the controls' values."""
        usual = (part.value for part in self.parts.values())  # where a number was taken out and none put in
        filled = (known if value is None else value for value, known in zip(values, usual, strict=True))
        given = dict(zip(self.parts, filled, strict=True))
        strengths = {name: float(given.pop(f"preset {name}")) for name in self.ground.presets}
        own = {name: given.pop(name) for name in ("threshold", "slope", "first", "last") if name in given}
        whole = {name: int(own.pop(name)) for name in ("first", "last") if name in own}
        return PlaySettings(strengths=strengths, **own, **whole), given


def _slider(gradio: Any, span: tuple[float, float, float], value: float, label: str) -> Any:
    low, high, step = span
    elem_id = label.lower().replace(" ", "-")
    return gradio.Slider(low, high, value, step=step, label=label, elem_id=elem_id)


def _results(gradio: Any) -> list[Any]:
    """Return the parts of the page that show what `Playground.show` gives, in its order."""
    figures = gradio.HTML(padding=False, elem_id="figures")
    with gradio.Row():
        with gradio.Column(min_width=300):
            model = gradio.HTML(padding=False, elem_id="model")
        with gradio.Column(min_width=300):
            other = gradio.HTML(padding=False, elem_id="other")
    apart = gradio.HTML(padding=False, elem_id="difference")
    with gradio.Accordion("As code", open=False):
        code = gradio.Code(language="python", show_label=False, interactive=False, elem_id="code")
    return [figures, model, other, apart, code]


def _wire(gradio: Any, page: Any, ground: Playground, controls: _Controls, shown: list[Any]) -> None:
    """Connect the controls: what is clicked, moved or typed runs the model, and shows what it gives."""
    parts = list(controls.parts.values())
    defaults = [controls.parts[name].value for name in controls.moved]

    def run(*values: Any) -> list[Any]:
        settings, asked = controls.read(values)
        try:
            played = ground.show(settings=settings, **asked)
        except HfGluError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        return [played.figures, played.model, played.beside, played.difference, played.code]

    moved = [part.change for name, part in controls.parts.items() if name != "text"]
    triggers = [page.load, controls.run.click, controls.parts["text"].submit, *moved]
    quiet = {"api_visibility": "private"}
    gradio.on(triggers, run, parts, shown, trigger_mode="always_last", show_progress="minimal", **quiet)
    controls.reset.click(lambda: defaults, None, [controls.parts[name] for name in controls.moved], **quiet)
    saved = controls.export.click(
        lambda *values: ground.export_html(controls.read(values)[0]), parts, controls.exported, **quiet
    )
    saved.then(None, None, None, js=SAVE, **quiet)
