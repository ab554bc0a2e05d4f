"A headless Chromium that is told what to do through a pipe (the DevTools protocol), so that no driver is needed."

import json
import os
import select
import shutil
import subprocess
import time
from urllib.parse import unquote

program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    "One tab. `complaints` are the errors in its console, exceptions and whatever did not load, since the last `open`"

    def __init__(self, profile, width=1200, height=900):
        here, there = os.pipe(), os.pipe()  # (read, write): to the browser, and from it

        def as_3_and_4():
            os.dup2(here[0], 3)
            os.dup2(there[1], 4)

        os.set_inheritable(here[0], True)
        os.set_inheritable(there[1], True)
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe --no-first-run"
        offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        command = [program, *flags.split(), offline, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, preexec_fn=as_3_and_4, close_fds=False, **quiet)
        self.to, self.back = here[1], there[0]
        os.close(here[0])
        os.close(there[1])
        self.last, self.rest, self.events, self.session = 0, b"", [], None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def _read(self, deadline):
        "The next message"
        while b"\0" not in self.rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.back], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            if not (more := os.read(self.back, 2**16)):
                raise RuntimeError("the browser has ended")
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def ask(self, method, timeout=60, **params):
        "Call a method of the protocol, and wait for its answer"
        self.last += 1
        message = dict(id=self.last, method=method, params=params)
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while (answer := self._read(deadline)).get("id") != self.last:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, url, timeout=60):
        "Go to a page and wait until all of it is loaded"
        self.events = []
        self.ask("Page.navigate", url=url)
        deadline = time.monotonic() + timeout
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self._read(deadline))

    @property
    def complaints(self):
        res = []
        for e in self.events:
            what, p = e["method"], e["params"]
            if what == "Runtime.exceptionThrown":
                res.append(p["exceptionDetails"]["text"])
            elif what == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert"):
                res.append(str([a.get("value") for a in p["args"]]))
            elif what == "Log.entryAdded" and p["entry"]["level"] == "error":
                res.append(f"{p['entry']['text']} {unquote(p['entry'].get('url', ''))}")
            elif what == "Network.loadingFailed" and not p.get("canceled"):
                res.append(p["errorText"])
        return res

    def value(self, expression):
        "What a JavaScript expression, or the promise it gives, comes to"
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["text"])
        return answer["result"].get("value")

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)
