"""The page in gradio: its parts, and which of them tells which doing. Swaps, colours and turns need no server."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from point_peft.data.optional import optional
from point_peft.demo.figure import DISTANCE
from point_peft.demo.handling import NOTHING, PICTURE_FILE, Chosen, Handling, Update, others
from point_peft.demo.views import VIEWS

HERE = Path(__file__).parent
TITLE = "Try point_peft"
ABOUT = "One frozen backbone, one small file per task. Choose a cloud and an adapter: see what it answers, and why."
UPLOADS = "PLY, OFF, LAS, LAZ, NPY, NPZ and more"
CHOICES = ("cloud", "uploaded", "adapter", "other", "view", "turn", "tilt")
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
"""Fonts of the system: none is fetched."""
Parts = dict[str, Any]


def gradio() -> Any:
    """The package that the page is made with; raises `DataError`, with the command that installs it."""
    # It would tell others that it runs here, and ask them for news.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    optional("plotly", "pages to try adapters", "demo")
    return optional("gradio", "pages to try adapters", "demo")


def page(handling: Handling) -> Any:
    """The page, ready to be launched."""
    gr = gradio()
    first = handling.begin()
    made = handling.whole(first)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=False) as blocks:
        gr.HTML(f"<h1>{TITLE}</h1><p>{ABOUT}</p>", elem_classes="pp-head")
        parts: Parts = {"uploaded": gr.State("")}
        with gr.Row(equal_height=False):
            with gr.Column(scale=0, min_width=312, elem_id="pp-choices"):
                _choices(gr, parts, handling, first)
            with gr.Column(scale=1, min_width=320):
                _answers(gr, parts, made)
        _connect(gr, parts, handling)
    return blocks


def _choices(gr: Any, parts: Parts, handling: Handling, first: Chosen) -> None:
    names = handling.board.names
    with gr.Group(elem_classes="pp-card"):
        parts["cloud"] = gr.Radio(handling.clouds(first), value=first.cloud, label="Cloud", elem_id="pp-cloud")
        parts["upload"] = gr.UploadButton("Upload a cloud", size="sm", elem_id="pp-upload")
        gr.HTML(f'<p class="pp-small">{UPLOADS}</p>')
    with gr.Group(elem_classes="pp-card"):
        parts["adapter"] = gr.Radio(names, value=first.task, label="Adapter", elem_id="pp-adapter")
        parts["other"] = gr.Radio(others(names), value=NOTHING, label="Compare with", elem_id="pp-other")
        parts["source"] = gr.Textbox(
            label="Another adapter", placeholder="folder, or owner/name", elem_id="pp-source", max_lines=1
        )
        parts["load"] = gr.Button("Load", size="sm", elem_id="pp-load")
    with gr.Group(elem_classes="pp-card"):
        views = [(label, name) for name, label in VIEWS.items()]
        parts["view"] = gr.Radio(views, value=first.view, label="Colour by", elem_id="pp-view")
        angles = {"turn": (180, first.turn), "tilt": (90, first.tilt)}
        for name, (most, value) in angles.items():
            parts[name] = gr.Slider(
                -most, most, value, step=5, label=name.capitalize(), buttons=[], elem_id=f"pp-{name}"
            )
    parts["write"] = gr.Button(f"Write {PICTURE_FILE}", size="sm", elem_id="pp-write")
    parts["download"] = gr.DownloadButton(f"Download {PICTURE_FILE}", size="sm", visible=False, elem_id="pp-download")


def _answers(gr: Any, parts: Parts, made: Update) -> None:
    def html(name: str) -> Any:
        return gr.HTML(**made.get(name, {"value": ""}), elem_id=f"pp-{name.replace('_', '-')}")

    parts["alert"] = gr.HTML("", visible=False, elem_id="pp-alert")
    parts["note"], parts["compared"] = html("note"), html("compared")
    with gr.Row(elem_id="pp-sides", equal_height=False):
        for side in "ab":
            with gr.Column(visible=side == "a", min_width=280, elem_classes=f"pp-card pp-side-{side}") as column:
                parts[f"plot_{side}"] = gr.Plot(
                    **made.get(f"plot_{side}", {"value": None}),
                    show_label=False,
                    container=False,
                    elem_id=f"pp-cloud-{side}",
                )
                parts[f"caption_{side}"] = html(f"caption_{side}")
                parts[f"answer_{side}"] = html(f"answer_{side}")
            parts[f"side_{side}"] = column
    for name in ("near", "tasks"):
        with gr.Column(elem_classes="pp-card"):
            parts[name] = html(name)


def _connect(gr: Any, parts: Parts, handling: Handling) -> None:
    choices = [parts[name] for name in CHOICES]
    # The buttons tell, and nothing is put into them.
    outputs = [part for name, part in parts.items() if name not in ("upload", "load", "write", "side_a")]

    def told(do: Callable[..., Update]) -> Callable[..., Mapping[Any, Any]]:
        def run(*values: Any) -> Mapping[Any, Any]:
            *given, cloud, uploaded, task, other, view, turn, tilt = values
            chosen = Chosen(
                cloud=cloud, uploaded=uploaded, task=task, other=other, view=view, turn=float(turn), tilt=float(tilt)
            )
            return {parts[name]: gr.update(**properties) for name, properties in do(*given, chosen).items()}

        return run

    def connect(event: Any, do: Callable[..., Update], given: Sequence[Any] = ()) -> None:
        event(told(do), [*given, *choices], outputs, show_progress="hidden", api_visibility="private")

    connect(parts["cloud"].input, handling.choose)
    connect(parts["upload"].upload, handling.upload, [parts["upload"]])
    connect(parts["load"].click, handling.load, [parts["source"]])
    connect(parts["source"].submit, handling.load, [parts["source"]])
    connect(parts["other"].input, handling.compare)
    connect(parts["adapter"].input, handling.swap)
    connect(parts["write"].click, handling.write)


class OwnHostOnly:
    """Tells browsers, with every answer, to fetch nothing from other hosts, whatever the page's parts would like."""

    POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; form-action 'self'"

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", self.POLICY.encode())
                message = {**message, "headers": [*message["headers"], policy]}
            await send(message)

        await self.app(scope, receive, with_policy)


def launch(blocks: Any, host: str, port: int | None, browser: bool, folder: Path) -> str:
    """Serve the page in a thread; returns its address. Raises `OSError` where the port is taken."""
    gr = gradio()
    middleware: Any = optional("starlette.middleware", "pages to try adapters", "demo")
    script = (HERE / "page.js").read_text("utf-8").replace("/*distance*/2", str(DISTANCE))
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        ssr_mode=False,
        allowed_paths=[str(folder / PICTURE_FILE)],
        theme=gr.themes.Base(
            font=FONT, font_mono=["ui-monospace", "monospace"], primary_hue="blue", neutral_hue="slate"
        ),
        # Not as its css=, to which Gradio puts selectors of its own.
        head=f"<style>{(HERE / 'page.css').read_text('utf-8')}</style><script>{script}</script>",
        app_kwargs={"middleware": [middleware.Middleware(OwnHostOnly)]},
    )
    return str(address)
