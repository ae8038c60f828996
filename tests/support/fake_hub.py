"""A Hugging Face Hub on this computer: as much of it as pushing and pulling a store asks for.

`FakeHub` is the server; every commit is a folder of files. `Visitor` is a process in which the real
huggingface_hub talks to it: where the Hub is gets decided when that library is imported, and in the
process of the tests it is switched off.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_made_up"


class FakeHub:
    """Repositories below a folder, served on 127.0.0.1 while the `with` block lasts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.branches: dict[str, dict[str, str]] = {}  # repository -> branch -> commit
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str, list[str]]] = []  # repository, message, files
        self.listed: list[str] = []  # what every tree claims to have besides
        self.interlude: Callable[[], object] = lambda: None  # between looking and committing
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, repository: str, private: bool = False) -> None:
        self.private[repository] = private
        self.branches[repository] = {}
        self.commit(repository, "main", "initial commit", {".gitattributes": b""})

    def commit(self, repository: str, branch: str, message: str, files: dict[str, bytes]) -> str:
        parent = self.branches[repository].get(branch)
        name = hashlib.sha1(str(len([*self.root.iterdir()])).encode()).hexdigest()
        folder = self.root / name
        if parent:
            shutil.copytree(self.root / parent, folder)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        self.commits.append((repository, message, sorted(files)))
        self.branches[repository][branch] = name
        return name

    def resolve(self, repository: str, revision: str) -> str | None:
        known = self.branches[repository]
        return known.get(revision) or (revision if (self.root / revision).is_dir() else None)

    def folder(self, repository: str, revision: str = "main") -> Path:
        """The files of a revision, for a test to look at or to spoil."""
        return self.root / str(self.resolve(repository, revision))

    def names(self, repository: str, revision: str = "main") -> list[str]:
        folder = self.folder(repository, revision)
        files = [path for path in folder.rglob("*") if path.is_file()]
        return sorted(path.relative_to(folder).as_posix() for path in files) + self.listed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub: FakeHub = self.server.hub  # type: ignore[attr-defined]
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        steps = [unquote(step) for step in urlsplit(self.path).path.strip("/").split("/")]
        if steps == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "Unauthorized", "")
        if steps == ["api", "repos", "create"]:
            return self._create(**json.loads(self.body))
        api = steps[:2] == ["api", "models"]
        repository, rest = "/".join(steps[2:4] if api else steps[:2]), steps[4 if api else 2 :]
        if repository not in self.hub.branches:
            return self._refuse(404, "Repository not found", "RepoNotFound")
        if rest[:1] == ["branch"]:
            return self._branch(repository, rest[1])
        commit = self.hub.resolve(repository, rest[1] if rest else "main")
        if commit is None:
            return self._refuse(404, "Invalid rev", "RevisionNotFound")
        act = {"revision": self._info, "tree": self._tree, "preupload": self._preupload}
        act |= {"commit": self._commit, "resolve": self._file}
        return act[rest[0] if rest else "revision"](repository, commit, rest[1:])

    def _create(self, name: str, organization: str, visibility: str = "public", **_: object):
        repository = f"{organization}/{name}"
        known = repository in self.hub.branches
        if not known:
            self.hub.create(repository, visibility == "private")
        url = {"url": f"{self.hub.url}/{repository}"}
        return self._send(409 if known else 200, json.dumps(url).encode(), {})

    def _branch(self, repository: str, branch: str) -> None:
        branches = self.hub.branches[repository]
        if branch in branches:
            return self._refuse(409, "Reference already exists", "")
        branches[branch] = branches["main"]
        return self._json({})

    def _info(self, repository: str, commit: str, rest: list[str]) -> None:
        siblings = [{"rfilename": name} for name in self.hub.names(repository, commit)]
        self._json({"id": repository, "sha": commit, "siblings": siblings})

    def _tree(self, repository: str, commit: str, rest: list[str]) -> None:
        files = []
        for name in self.hub.names(repository, commit):
            path = self.hub.root / commit / name
            size = path.stat().st_size if path.is_file() else 1
            files.append({"type": "file", "path": name, "size": size, "oid": _oid(path)})
        self._json(files)

    def _preupload(self, repository: str, commit: str, rest: list[str]) -> None:
        self.hub.interlude()
        files = []
        for file in json.loads(self.body)["files"]:
            path = self.hub.root / commit / file["path"]
            known = {"oid": _oid(path)} if path.is_file() else {}
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            files.append({"path": file["path"], **mode, **known})
        self._json({"files": files})

    def _commit(self, repository: str, commit: str, rest: list[str]) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", commit) != commit:
            return self._refuse(412, "A commit has happened since", "")
        assert {line["key"] for line in lines[1:]} == {"file"}
        files = {line["value"]["path"]: line["value"]["content"] for line in lines[1:]}
        content = {path: base64.b64decode(text) for path, text in files.items()}
        name = self.hub.commit(repository, rest[0], header["summary"], content)
        url = f"{self.hub.url}/{repository}/commit/{name}"
        return self._json({"commitUrl": url, "commitOid": name})

    def _file(self, repository: str, commit: str, rest: list[str]) -> None:
        path = self.hub.root / commit / "/".join(rest[1:])
        if not path.is_file():
            return self._refuse(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": commit}
        return self._send(200, path.read_bytes(), headers)

    def _refuse(self, status: int, message: str, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Message": message, "X-Error-Code": code})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(path: Path) -> str:
    data = path.read_bytes() if path.is_file() else b""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Visitor:
    """Another process, with or without a token, that pushes and pulls when it is told to."""

    def __init__(self, url: str, home: Path) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**kept, **settings, "HF_HUB_DISABLE_TELEMETRY": "1"},
        )

    def __call__(self, *arguments: object, token: str | None = TOKEN, **options: object) -> str:
        """Do `push store to` or `pull source to`; return its answer, or `ErrorClass: message`."""
        order = {"arguments": [*map(str, arguments)], "options": options, "token": token}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def leave(self) -> None:
        self._process.communicate()


def _visit() -> None:
    from mm_piece.errors import PieceError
    from mm_piece.store.delta_store import DeltaStore
    from mm_piece.store.sharing import pull, push

    for line in sys.stdin:
        order = json.loads(line)
        act, first, to = order["arguments"]
        os.environ.pop("HF_TOKEN", None)
        if order["token"]:
            os.environ["HF_TOKEN"] = order["token"]
        try:
            if act == "push":
                answer = push(DeltaStore.open(first), to, **order["options"])
            else:
                answer = str(len(pull(first, to, **order["options"])))
        except PieceError as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _visit()
