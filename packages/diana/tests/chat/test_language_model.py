"""A conversation whose questions come from a server."""

import io
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from diana.cli import chat_main, index_main


def test_questions_come_from_the_server_and_from_the_list_when_it_fails(
    pretrained: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status = 200 if len(bodies) == 1 else 401
            answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Which shoes?"}}]}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    index = tmp_path / "g.lance"
    assert index_main(["--pretrained", str(pretrained), "--images", str(world / "ChatPedes"), "--out", str(index)]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("A man in a coat.\nBlack ones.\nA red one.\nquit\n"))
    try:
        flags = ["--pretrained", str(pretrained), "--index", str(index), "--out_dir", str(tmp_path), "--topk", "1"]
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        assert chat_main([*flags, "--llm_base_url", url, "--llm_model", "fake"]) == 0
    finally:
        server.shutdown()
        server.server_close()
    shown = capsys.readouterr()
    assert "ASSISTANT: Which shoes?" in shown.out
    assert [message["role"] for message in bodies[0]["messages"]] == ["system", "assistant", "user"]
    assert bodies[0]["messages"][-1]["content"] == "A man in a coat."
    assert "the language model does not answer" in shown.err
    assert shown.out.count("ASSISTANT: ") == 4
    assert len(bodies) == 2 and shown.err.count("note:") == 1  # a server that refuses is not asked again
