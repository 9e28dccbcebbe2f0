"""A real HTTP server that speaks `/v1/chat/completions`, with faults on demand."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer(ThreadingHTTPServer):
    """`answer(messages, body)` gives a text; `faults` lists faults by user text, used up."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.faults = answer, {}
        self.bodies, self.headers, self.times = [], [], []
        self.asked = Counter()
        self.now = self.most = 0
        self.stop_after = None
        """Answers after which the key is refused."""
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # `/v1/images/generations` has a prompt instead of messages.
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            server.asked[text if isinstance(text, str) else "parts"] += 1
            server.now += 1
            server.most = max(server.most, server.now)
            left = server.faults.get(text if isinstance(text, str) else "parts", [])
            fault = left.pop(0) if left else None
            if server.stop_after is not None and len(server.bodies) > server.stop_after:
                fault = 401
        try:
            self._respond(body, fault)
        except BrokenPipeError:
            pass
        finally:
            with server.lock:
                server.now -= 1

    def _respond(self, body, fault):
        if self.path == "/v1/images/generations" and not isinstance(fault, int):
            return self._send(200, {"data": [{"b64_json": self.server.answer(None, body)}]})
        if self.path not in ("/v1/chat/completions", "/v1/images/generations"):
            return self._send(404, {"error": {"message": "no such path"}})
        if isinstance(fault, int):
            return self._send(fault, {"error": {"message": f"fault {fault}"}})
        if isinstance(fault, tuple):
            return self._send(fault[0], {"error": "slow down"}, {"Retry-After": fault[1]})
        if fault == "slow":
            time.sleep(1.2)
        message = {"role": "assistant", "content": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        if fault == "refusal":
            message["refusal"] = "I cannot help with that"
        elif fault != "empty":
            message["content"] = self.server.answer(body["messages"], body)
        if body.get("logprobs"):
            top = [{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -2.4}]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        usage = {"prompt_tokens": 7, "completion_tokens": 3}
        document = {"choices": [choice], "usage": usage}
        if fault == "foreign":
            document = {"result": "ok"}
        self._send(200, document, cut=fault == "truncated")

    def _send(self, code, document, headers=None, cut=False):
        data = json.dumps(document).encode()
        data = data[: len(data) // 2] if cut else data
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def serving(answer):
    server = ChatServer(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
