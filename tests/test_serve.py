"""The server of the examples: whose answer each is, what is counted, what bad input gets, how it ends.

In the suite some hundred requests; POINT_PEFT_REQUESTS=1000 in the environment asks for more.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor, nn

from examples import load, serve
from examples.serve import MAX_BODY
from examples.serving.loopback import ask as send_and_receive
from examples.serving.loopback import running
from examples.serving.random_adapters import answers_alone, apart, write_adapters
from point_peft import LoraConfig, PeftConfig, RoutingBankConfig, get_peft_model
from point_peft.backbones import PointTransformer
from point_peft.files.format import RUN_FILE, TENSOR_FILE
from tests.forks import Server as Forks
from tests.hanging import until

ADAPTERS, CONNECTIONS = 20, 6
REQUESTS = int(os.environ.get("POINT_PEFT_REQUESTS", "120"))
CLOUDS = torch.rand(4, 48, 3, generator=torch.Generator().manual_seed(0))


def tiny(classes: int) -> PointTransformer:
    torch.manual_seed(0)
    model = PointTransformer(
        trans_dim=24, depth=2, num_heads=2, num_group=8, group_size=4, encoder_dims=24, cls_dim=classes
    )
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty adapters, and the record of a run with names of classes beside the first."""
    root = tmp_path_factory.mktemp("adapters")
    write_adapters(tiny, root, ADAPTERS)
    record = {"task": "classification", "classes": [f"digit {number}" for number in range(10)], "finished": True}
    (root / "task00" / RUN_FILE).write_text(json.dumps(record), "utf-8")
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Tensor]:
    return answers_alone(tiny, folder, CLOUDS)


Ask = Callable[..., Coroutine[Any, Any, tuple[int, Any]]]


@asynccontextmanager
async def asking(server: serve.Server) -> AsyncIterator[tuple[Ask, int]]:
    """A server at work, one connection to it, and its port; answers of JSON come as what they mean."""
    async with running(server.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def ask(what: str, content: Any = b"") -> tuple[int, Any]:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            status, answer = await send_and_receive(reader, writer, what, body)
            return status, answer.decode() if what == "GET /metrics" else json.loads(answer)

        yield ask, port
        writer.close()


def predict(adapter: str, cloud: Tensor = CLOUDS[0]) -> dict[str, Any]:
    return {"adapter": adapter, "points": cloud.tolist()}


def numbers(text: str) -> dict[tuple[str, ...], float]:
    """The values of a page of metrics, by their names and labels, as Prometheus reads it."""
    values = {}
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        name = sample.name.removeprefix("point_peft_")
        assert name != sample.name
        values[(name, *(sample.labels[label] for label in sorted(sample.labels)))] = sample.value
    return values


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_every_answer_under_load_is_that_of_its_adapter_alone(folder: Path, expected: dict[str, Tensor]) -> None:
    assert apart(expected) > 100 * load.TOLERANCE
    server = serve.Server(tiny(10), folder)
    asked = load.requests(list(expected), len(CLOUDS), REQUESTS - ADAPTERS) + [(name, 0) for name in expected]

    replies = asyncio.run(load.send(server, asked, CLOUDS, CONNECTIONS))
    assert Counter((reply.adapter, reply.cloud) for reply in replies) == Counter(asked)
    assert all(load.is_right(reply, expected) for reply in replies)

    counted = numbers(server.metrics.text().decode())
    for name, number in Counter(name for name, _ in asked).items():
        assert counted["requests_total", name, "200"] == number
    assert counted["request_seconds_count",] == counted["request_seconds_bucket", "+Inf"] == REQUESTS
    assert counted["request_seconds_sum",] > 0
    assert counted["batch_clouds_total",] == REQUESTS >= counted["batches_total",]
    assert counted["adapters_in_memory",] == 16 and counted["adapter_bytes",] > 1000
    assert counted["adapter_loads_total",] >= ADAPTERS


def test_what_waits_becomes_one_batch_of_mixed_adapters(folder: Path, expected: dict[str, Tensor]) -> None:
    batches = serve.Server(tiny(10), folder, most=8).batches
    names = [*list(expected)[:5], "task01"]

    async def run() -> list[dict[str, Any]]:
        waiting = [asyncio.ensure_future(batches.predict(name, CLOUDS[place % 4])) for place, name in enumerate(names)]
        waiting.append(asyncio.ensure_future(batches.predict("task02", CLOUDS[0, :32])))
        while len(batches.waiting) < len(waiting):
            await asyncio.sleep(0)
        running = asyncio.create_task(batches.run())
        answers = await asyncio.gather(*waiting)
        running.cancel()
        return answers

    *answers, short = asyncio.run(run())
    assert (batches.batches, batches.clouds) == (2, 7), "six clouds of as many points, then the one of fewer"
    assert short["adapter"] == "task02"
    for place, (name, answer) in enumerate(zip(names, answers, strict=True)):
        assert load.is_right(load.Reply(name, place % 4, 200, answer, 0.0), expected)
    assert answers[0]["class"] == f"digit {int(expected['task00'][0].argmax())}"
    assert answers[1]["class"] == str(int(expected["task01"][1].argmax())) and len(answers[1]["classes"]) == 4


def test_an_answer_of_another_adapter_is_noticed(expected: dict[str, Tensor]) -> None:
    answer = {"adapter": "task00", "probabilities": expected["task00"][1].tolist()}
    right = load.Reply("task00", 1, 200, answer, 0.0)
    assert load.is_right(right, expected)
    assert not load.is_right(replace(right, answer={**answer, "adapter": "task02"}), expected)
    for other in ("task01", "task02"):
        assert not load.is_right(
            replace(right, answer={**answer, "probabilities": expected[other][1].tolist()}), expected
        )
    assert not load.is_right(replace(right, status=400), expected)
    nearer = {**expected, "task02": torch.tensor(answer["probabilities"]).expand(4, -1)}
    assert not load.is_right(right, {**nearer, "task00": expected["task00"] + 1e-5})


def test_the_load_of_the_examples_runs(capsys: pytest.CaptureFixture[str]) -> None:
    load.main(["--requests", "12", "--adapters", "3", "--connections", "3"])
    printed = capsys.readouterr().out
    for words in ("12 requests over 3 adapters, 3 at a time", "a second", "median", "3 loads", "no answer is wrong"):
        assert words in printed


def test_auto_is_the_adapter_whose_bank_is_most_like_the_cloud(tmp_path: Path) -> None:
    def clouds(height: float, count: int, seed: int) -> Tensor:
        drawn = torch.randn(count, 48, 3, generator=torch.Generator().manual_seed(seed))
        return nn.functional.normalize(drawn, dim=2) * torch.tensor([1.0, 1.0, height])

    for name, height in (("balls", 1.0), ("plates", 0.05)):
        model = get_peft_model(tiny(10), PeftConfig(tuners=(LoraConfig(r=2), RoutingBankConfig())))
        model.build_memory_bank(clouds(height, 40, 7).split(20))
        model.save_pretrained(tmp_path / name)
    pole = clouds(1.0, 1, 1)[0] * torch.tensor([0.02, 0.02, 3.0])

    async def run() -> None:
        async with asking(serve.Server(tiny(10), tmp_path)) as (ask, _):
            for name, height in (("balls", 1.0), ("plates", 0.05)):
                status, answer = await ask("POST /predict", predict("auto", clouds(height, 1, 50)[0]))
                assert (status, answer["adapter"]) == (200, name)
            status, answer = await ask("POST /predict", predict("auto", pole))
            assert status == 404 and "no adapter's bank is like this cloud" in answer["error"]
            status, answer = await ask("POST /predict", predict("auto", CLOUDS[0, :3]))
            assert status == 400 and "no adapter can be chosen: " in answer["error"]

    asyncio.run(run())


# ---- what cannot be answered -----------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, Any, int, str]] = {
    "an unknown adapter": ("POST /predict", predict("task2"), 404, "has no adapter 'task2'; nearest: 'task"),
    "no bank": ("POST /predict", predict("auto"), 400, "no adapter here has a routing bank"),
    "no JSON": ("POST /predict", b"\xff{", 400, 'the body is not JSON; send {"adapter": NAME, "points": [[x, y, z]'),
    "no body": ("POST /predict", b"", 400, "the body is not JSON"),
    "deep JSON": ("POST /predict", b"[" * 100_000, 400, "the body is not JSON"),
    "no object": ("POST /predict", [1, 2], 400, "names no adapter"),
    "a number for a name": ("POST /predict", {"adapter": 3, "points": [[0, 0, 0]]}, 400, "names no adapter"),
    "no points": ("POST /predict", {"adapter": "task00"}, 400, "not rows of three numbers"),
    "words": ("POST /predict", {"adapter": "task00", "points": [["a", "b", "c"]]}, 400, "not rows of three numbers"),
    "ragged rows": ("POST /predict", {"adapter": "task00", "points": [[1, 2, 3], [4]]}, 400, "not rows of three"),
    "an object": ("POST /predict", {"adapter": "task00", "points": {"x": 1}}, 400, "not rows of three numbers"),
    "huge": ("POST /predict", {"adapter": "task00", "points": [[10**400, 0, 0]]}, 400, "not rows of three numbers"),
    "two columns": ("POST /predict", predict("task00", CLOUDS[0, :, :2]), 400, "have the shape (48, 2), not (n, 3)"),
    "a batch": ("POST /predict", predict("task00", CLOUDS), 400, "have the shape (4, 48, 3), not (n, 3)"),
    "an empty cloud": ("POST /predict", {"adapter": "task00", "points": []}, 400, "have the shape (0,), not (n, 3)"),
    "NaN": ("POST /predict", predict("task00", CLOUDS[0] / 0 * 0), 400, "some coordinates are not finite"),
    "beyond float32": ("POST /predict", {"adapter": "task00", "points": [[1e39, 0, 0]]}, 400, "not "),
    "far away": ("POST /predict", predict("task00", CLOUDS[0] * 1e38), 400, "the answer is not finite"),
    "too few points": ("POST /predict", predict("task00", CLOUDS[0, :3]), 400, "this cloud cannot be answered: "),
    "a wrong path": ("GET /", b"", 404, "there is no GET /, but POST /predict, GET /metrics"),
    "a wrong method": ("GET /predict", b"", 405, "there is no GET /predict, but POST /predict"),
    "another wrong method": ("DELETE /metrics", b"", 405, "there is no DELETE /metrics, but "),
}


@pytest.fixture(scope="module")
def replies_to_bad(folder: Path) -> dict[str, tuple[int, Any]]:
    """What one server answers over one connection to all of `BAD`, and then to a request in order."""

    async def run() -> dict[str, tuple[int, Any]]:
        async with asking(serve.Server(tiny(10), folder)) as (ask, _):
            replies = {case: await ask(what, content) for case, (what, content, _, _) in BAD.items()}
            return {**replies, "good": await ask("POST /predict", predict("task03")), "page": await ask("GET /metrics")}

    return asyncio.run(run())


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_sentence(case: str, replies_to_bad: dict[str, tuple[int, Any]]) -> None:
    status, answer = replies_to_bad[case]
    _, _, wanted, sentence = BAD[case]
    assert status == wanted and list(answer) == ["error"]
    assert sentence in answer["error"] and "\n" not in answer["error"] and "Traceback" not in answer["error"]


def test_the_server_goes_on_and_counts_what_it_refused(
    replies_to_bad: dict[str, tuple[int, Any]], expected: dict[str, Tensor]
) -> None:
    status, answer = replies_to_bad["good"]
    assert load.is_right(load.Reply("task03", 0, status, answer, 0.0), expected)
    counted = numbers(replies_to_bad["page"][1])
    by_status = Counter(wanted for _, _, wanted, _ in BAD.values())
    for status in (400, 404, 405):
        found = sum(value for name, value in counted.items() if (name[0], name[-1]) == ("requests_total", str(status)))
        assert found == by_status[status]
    assert counted["requests_total", "task00", "400"] == 2, "of an adapter, not of strangers"
    assert counted["request_seconds_count",] == 1


POST = b"POST /predict HTTP/1.1\r\nHost: loopback\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (POST + b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1) + b" " * (MAX_BODY + 1), 413, "has more than 4000000"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "the body is not JSON"),
        (POST + b"Content-Length: many\r\n\r\n", 400, "Invalid HTTP"),
        (b"hello\r\n\r\n", 400, "Invalid HTTP"),
        (b"GET /predict?x=1 HTTP/1.1\r\nHost: loopback\r\n\r\n", 405, "there is no GET /predict, "),
    ],
    ids=["too large", "chunked", "no length", "no HTTP", "a query"],
)
def test_what_no_client_would_send_gets_its_status(folder: Path, sent: bytes, status: int, said: str) -> None:
    async def run() -> tuple[str, str]:
        async with asking(serve.Server(tiny(10), folder)) as (ask, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            body = (await reader.readuntil(b"}" if status != 400 or "json" in head else b".")).decode()
            writer.close()
            assert (await ask("GET /metrics"))[0] == 200
            return head, body

    head, body = asyncio.run(run())
    assert head.startswith(f"HTTP/1.1 {status} ") and said in body
    assert ("allow: POST" in head) == (status == 405)


def test_a_client_that_goes_in_the_middle_of_its_request_is_no_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        async with asking(serve.Server(tiny(10), folder)) as (ask, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(POST + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")  # it is read by now
            writer.write(b"{")
            writer.close()
            await writer.wait_closed()
            assert (await ask("POST /predict", predict("task00")))[0] == 200

    asyncio.run(run())
    assert capsys.readouterr().err == ""


def test_an_adapter_that_is_damaged_is_no_loss_of_others(
    folder: Path, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    for name in ("task00", "task01"):
        shutil.copytree(folder / name, tmp_path / name)
    batches = serve.Server(tiny(10), tmp_path).batches
    tensors = tmp_path / "task01" / TENSOR_FILE
    tensors.write_bytes(tensors.read_bytes()[:-9])

    async def run() -> list[Any]:
        running = asyncio.create_task(batches.run())
        asked = [batches.predict(name, CLOUDS[0]) for name in ("task00", "task01", "task00")]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        running.cancel()
        return answers

    first, damaged, third = asyncio.run(run())
    for answer in (first, third):
        assert load.is_right(load.Reply("task00", 0, 200, answer, 0.0), expected)
    assert (damaged.status_code, damaged.adapter) == (500, "task01") and "this adapter cannot be used: " in str(damaged)


def test_names_of_other_classes_are_not_given(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "task00", tmp_path / "task00")
    record = tmp_path / "task00" / RUN_FILE
    record.write_text(record.read_text("utf-8").replace('"digit 9"', '"digit 9", "letter"'), "utf-8")

    async def run() -> tuple[int, Any]:
        async with asking(serve.Server(tiny(10), tmp_path)) as (ask, _):
            return await ask("POST /predict", predict("task00"))

    status, answer = asyncio.run(run())
    assert status == 500 and "gives 10 probabilities, and the run beside it has 11 classes" in answer["error"]


def test_a_failure_of_the_model_is_logged_and_the_server_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve.Server(tiny(10), folder)
    whole = server.batches.answer

    def fail(*_: Any) -> Any:
        monkeypatch.setattr(server.batches, "answer", whole)
        raise RuntimeError("no memory left")

    monkeypatch.setattr(server.batches, "answer", fail)

    async def run() -> None:
        async with asking(server) as (ask, _):
            assert await ask("POST /predict", predict("task00")) == (
                500, {"error": "the server failed; its log says why"},
            )  # fmt: skip
            assert (await ask("POST /predict", predict("task00")))[0] == 200

    asyncio.run(run())
    assert "no memory left" in capsys.readouterr().err


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_what_was_asked_is_answered_before_the_end(folder: Path, expected: dict[str, Tensor]) -> None:
    server = serve.Server(tiny(10), folder)

    async def run() -> list[load.Reply]:
        async with running(server.app) as port:
            _, idle = await asyncio.open_connection("127.0.0.1", port)  # asks nothing, and is not waited for
            asked = asyncio.ensure_future(load.client(port, iter([("task05", 2)]), CLOUDS.tolist()))
            while not server.batches.clouds:
                await asyncio.sleep(0)
        idle.close()
        return await asked

    (reply,) = asyncio.run(run())
    assert load.is_right(reply, expected)


def serve_to(folder: str, file: str) -> Callable[[], None]:
    """The command, with what it prints in a file."""

    def run() -> None:
        target = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(target, 1)
        os.dup2(target, 2)
        serve.main([folder, "--port", "0"])

    return run


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, signal.SIGTERM)])
def test_a_signal_ends_it_cleanly(folder: Path, tmp_path: Path, server: Forks, number: int, status: int) -> None:
    out = tmp_path / "printed"
    child = server.start(serve_to, folder, out)
    until(lambda: out.exists() and "running on http" in out.read_text())
    port = int(re.findall(r"http://127\.0\.0\.1:(\d+) ", out.read_text())[0])
    with socket.create_connection(("127.0.0.1", port)) as connection:  # stays open
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: loopback\r\n\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        os.kill(child, number)
        assert server.wait(child) == status
    assert "Application shutdown complete" in out.read_text() and "Traceback" not in out.read_text()


def test_the_command_says_why_it_does_not_begin(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="there is no adapter in"):
        serve.main([str(tmp_path)])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit, match="3"):
        serve.main([str(folder), "--port", str(taken.getsockname()[1])])
    assert "address already in use" in capfd.readouterr().err
