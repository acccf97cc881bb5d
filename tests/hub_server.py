"""A Hugging Face Hub on the loopback, for the unmodified client of huggingface_hub.

It answers what the library asks, and what its tests need to set the scene: models, users, private and gated
repositories, branches, tags, pull requests, commits, and two ways of sending a large file: LFS and Xet. With Xet the
content lies in a folder that hf_xet itself writes and reads (`casUrl: "local://..."`); all the rest is kept in memory.

    with HubServer(tmp_path) as hub:
        hub.put("alice/adapter", {"adapter_config.json": b"{}"})
        hub.fault("GET", "adapter_config.json", status=503)
        HfApi(endpoint=hub.url, token="hf_alice").model_info("alice/adapter")
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import selectors
import socket
import socketserver
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlencode

import yaml  # type: ignore[import-untyped]

# What the Hub keeps as LFS; the real one reads this from the .gitattributes that it puts into every new repository.
LFS_SUFFIXES = {".bin", ".ckpt", ".npy", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".zip"}
LFS_SIZE = 10_000_000
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)).encode()
NEVER = 2**40


@dataclass(frozen=True)
class Request:
    """A request that was seen: `path` as it was sent, with its query; `who` is the user whom the token names."""

    method: str
    path: str
    who: str | None
    token: str | None
    origin: Literal["hub", "cdn"]


@dataclass
class Fault:
    """Failure of the next `times` requests of a method and path; see `HubServer.fault`."""

    method: str
    path: str
    times: int
    status: int | None
    delay: float
    truncate: int | None
    corrupt: bool
    drop: bool
    headers: Mapping[str, str | None]


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its git object id, its size, and the sha256 of the content if it is kept as LFS."""

    oid: str
    size: int
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class PullRequest:
    title: str
    description: str
    author: str


@dataclass
class Repo:
    """A repository; `refs` maps full git names (`refs/heads/main`) to commit ids, `granted` may pass the gate."""

    id: str
    private: bool = False
    gated: str | Literal[False] = False
    granted: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[int, PullRequest] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def commit(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a full reference or the id of a commit (7 characters or more) names."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.commits[self.refs[name]]
        begun = [oid for oid in self.commits if oid.startswith(revision)] if len(revision) >= 7 else []
        if len(begun) != 1:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[begun[0]]

    def branch(self, revision: str) -> str:
        """The reference that a commit to this revision moves."""
        name = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if name not in self.refs:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name

    def history(self, revision: str) -> list[Commit]:
        commits, oid = [], self.commit(revision).oid
        while oid:
            commits.append(self.commits[oid])
            oid = commits[-1].parent or ""
        return commits


class Refusal(Exception):
    """An error as the Hub reports it: the client goes by X-Error-Code rather than by the status."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        # A path may hold anything, a header may not.
        self.headers = {"X-Error-Message": ascii(message)[1:-1]} | ({"X-Error-Code": code} if code else {})
        self.body = {"error": message} | more


@dataclass(frozen=True)
class Call:
    """A request while it is answered; `segments` is the path, split ahead of unquoting as revisions hold slashes."""

    method: str
    segments: list[str]
    query: Mapping[str, str]
    headers: Message
    body: bytes
    user: str | None
    filters: Sequence[str] = ()
    """The only name that stands in a query more than once."""

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.body.decode())

    def url(self, **query: str) -> str:
        asked = {**self.query, "filter": self.filters, **query}
        return "/" + "/".join(quote(part, safe="") for part in self.segments) + "?" + urlencode(asked, doseq=True)


@dataclass
class Answer:
    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_blob(sha256: str, size: int) -> Blob:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Blob(git_oid(pointer.encode()), size, sha256)


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (PurePosixPath(path).suffix in LFS_SUFFIXES or size > LFS_SIZE)


class XetStore:
    """The content-addressed store that hf_xet keeps in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.url = f"local://{folder}"
        self.access = {"endpoint": self.url, "token": "xet", "token_expiry_unix_secs": NEVER}
        self.hashes: dict[str, tuple[str, int]] = {}
        self.parsed: set[Path] = set()

    @cached_property
    def hf_xet(self) -> Any:
        # It opens its log under HF_HOME when it is imported: not before the test has a home of its own.
        return import_module("hf_xet")

    @cached_property
    def session(self) -> Any:
        return self.hf_xet.XetSession()

    def add(self, content: bytes) -> tuple[str, int]:
        with self.session.new_upload_commit(**self.access) as upload:
            upload.start_upload_bytes(content, sha256=self.hf_xet.COMPUTE_SHA256)
        return self.find(hashlib.sha256(content).hexdigest()) or ("", 0)

    def read(self, xet_hash: str, size: int) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "content")
            with self.session.new_file_download_group(**self.access) as download:
                download.start_download_file(self.hf_xet.XetFileInfo(xet_hash, size), str(path))
            return path.read_bytes()

    def find(self, sha256: str) -> tuple[str, int] | None:
        """The Xet hash and the size of the content with this sha256, as the shards tell them."""
        if sha256 not in self.hashes:
            for shard in set(self.folder.glob("xet/xorbs/shards/*.mdb")) - self.parsed:
                for known, xet_hash, size in self._files(shard.read_bytes()):
                    self.hashes.setdefault(known, (xet_hash, size))
                self.parsed.add(shard)
        return self.hashes.get(sha256)

    @staticmethod
    def _files(shard: bytes) -> Iterator[tuple[str, str, int]]:
        """sha256, Xet hash and size of each file of a shard.

        48 bytes of header; per file 48 bytes (hash, flags, number of segments), the segments of 48 bytes (the size at
        36), as many of verification if flag 31 is set, 48 with the sha256 if flag 30 is; 32 times 0xff ends the files.
        """

        def printed(at: int) -> str:
            return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", shard, at))

        at = 48
        while shard[at : at + 32] != b"\xff" * 32:
            xet_hash, (flags, segments) = printed(at), struct.unpack_from("<II", shard, at + 32)
            at += 48
            size = sum(struct.unpack_from("<I", shard, at + 48 * number + 36)[0] for number in range(segments))
            at += 48 * segments * (2 if flags >> 31 & 1 else 1)
            if flags >> 30 & 1:
                yield printed(at), xet_hash, size
                at += 48


class HubServer:
    """The Hub; `tokens` maps tokens to users, `page_size` is for listings."""

    def __init__(
        self, root: Path, tokens: Mapping[str, str] | None = None, xet: bool = False, page_size: int = 3
    ) -> None:
        self.tokens = {"hf_alice": "alice"} if tokens is None else dict(tokens)
        self.page_size = page_size
        self.xet = XetStore(root / "cas") if xet else None
        self.log: list[Request] = []
        self.collections: dict[str, list[tuple[str, str]]] = {}
        """Slug -> (kind, name) of its items."""
        self._repos: dict[str, Repo] = {}
        self._contents: dict[str, bytes] = {}
        self._faults: list[Fault] = []
        self._commits = 0
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        # The two differ in their port, so that the CDN is another origin to the client.
        self._listeners = [_Listener(self, "hub"), _Listener(self, "cdn")]
        self.url, self.cdn = (f"http://127.0.0.1:{listener.server_address[1]}" for listener in self._listeners)
        self._alarm, self._bell = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="hub", daemon=True)

    # What a test does

    def start(self) -> HubServer:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close the ports and every connection, also those that a client keeps alive."""
        self._stopping.set()
        self._bell.close()
        self._thread.join()
        self._alarm.close()
        for listener in self._listeners:
            listener.close()

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def fault(
        self,
        method: str,
        path_regex: str,
        times: int = 1,
        *,
        status: int | None = None,
        delay: float = 0.0,
        truncate: int | None = None,
        corrupt: bool = False,
        drop: bool = False,
        headers: Mapping[str, str | None] | None = None,
    ) -> None:
        """Let the next `times` requests fail whose method and path (as sent, searched) match.

        `status` and `drop` (no answer at all) leave the request undone. Otherwise it is done, and its answer comes
        `delay` seconds late, ends after `truncate` bytes of its body (0: a lost answer), has one byte of the body
        changed (`corrupt`), or has other `headers` (None leaves one out).
        """
        with self._lock:
            wrong = Fault(method, path_regex, times, status, delay, truncate, corrupt, drop, headers or {})
            self._faults.append(wrong)

    def mend(self) -> None:
        """From now on nothing goes wrong."""
        with self._lock:
            self._faults.clear()

    def seen(self, method: str, path_regex: str) -> list[Request]:
        return [one for one in list(self.log) if re.fullmatch(method, one.method) and re.search(path_regex, one.path)]

    def repo(self, repo_id: str) -> Repo:
        """The repository itself: `private`, `gated` ("auto", "manual" or False) and `granted` may be set."""
        return self._repos[repo_id]

    def put(self, repo_id: str, files: Mapping[str, bytes | None], revision: str = "main") -> Commit:
        """Commit files without any check (None deletes one); the repository is made if there is none."""
        with self._lock:
            if repo_id not in self._repos:
                self._create(repo_id)
            repo = self._repos[repo_id]
            changed = dict(repo.commit(revision).files)
            for path, content in files.items():
                if content is None:
                    del changed[path]
                else:
                    changed[path] = self._store(path, content)
            return self._commit(repo, repo.branch(revision), changed, "Put", "", repo.owner)

    def tamper(self, repo_id: str, path: str, content: bytes, revision: str = "main") -> None:
        """Serve other content for a file under its old hashes, as if the storage had rotted."""
        with self._lock:
            blob = self._repos[repo_id].commit(revision).files[path]
            if blob.sha256 and self.xet and self.xet.find(blob.sha256):
                self.xet.hashes[blob.sha256] = self.xet.add(content)
            else:
                self._contents[blob.etag] = content

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        with self._lock:
            blobs = self._repos[repo_id].commit(revision).files
            return {path: self._read(blob) for path, blob in blobs.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits of a branch, the newest first; the last one is the Hub's own that brought .gitattributes."""
        with self._lock:
            return self._repos[repo_id].history(revision)

    # Connections

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._alarm, selectors.EVENT_READ)
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ, listener)
            while not self._stopping.is_set():
                for key, _ in selector.select():
                    if key.data:
                        key.data.handle_request()

    def respond(
        self, origin: Literal["hub", "cdn"], method: str, target: str, headers: Message, body: bytes
    ) -> tuple[Answer, int | None] | None:
        """The answer, and after how many bytes of its body the connection breaks; None if there is no answer."""
        token = headers.get("Authorization", "").removeprefix("Bearer ") or None
        user = self.tokens.get(token) if token else None
        with self._lock:
            self.log.append(Request(method, target, user, token, origin))
            fault = self._next_fault(method, target)
        if fault and ((fault.delay and self._stopping.wait(fault.delay)) or fault.drop):
            return None
        path, _, query = target.partition("?")
        segments = [unquote(part) for part in path.split("/")[1:]]
        # The answer to HEAD is GET's without its body.
        filters = parse_qs(query).get("filter", [])
        call = Call("GET" if method == "HEAD" else method, segments, dict(_pairs(query)), headers, body, user, filters)
        try:
            if fault and fault.status:
                raise Refusal(fault.status, f"Fault {fault.status}")
            if token and not user and origin == "hub":
                raise Refusal(401, "Invalid credentials in Authorization header")
            with self._lock:
                answer = self._from_storage(call) if origin == "cdn" else self._answer(call)
        except Refusal as refusal:
            answer = as_json(refusal.body, refusal.status, refusal.headers)
        if not fault:
            return answer, None
        for name, value in fault.headers.items():
            answer.headers.pop(name, None)
            if value is not None:
                answer.headers[name] = value
        if fault.corrupt and answer.content:
            answer.content = answer.content[:-1] + bytes([answer.content[-1] ^ 1])
        return answer, fault.truncate

    def _next_fault(self, method: str, target: str) -> Fault | None:
        for fault in self._faults:
            if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, target):
                fault.times -= 1
                return fault
        return None

    # The storage of large files: another origin that knows no tokens

    def _from_storage(self, call: Call) -> Answer:
        match call.method, *call.segments:
            case "GET", "files", sha256, *_:
                return self._ranged(call, self._read(lfs_blob(sha256, 0)), {"ETag": f'"{sha256}"'})
            case "PUT", "upload", oid:
                return self._upload(oid, call.body)
        raise Refusal(404, "Not found")

    def _upload(self, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content does not have the sha256 that was announced.")
        self._contents[oid] = content
        return Answer()

    def _ranged(self, call: Call, content: bytes, headers: Mapping[str, str]) -> Answer:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
        if not asked:
            return Answer(content, headers={**headers, "Accept-Ranges": "bytes"})
        first, last = int(asked[1]), min(int(asked[2] or NEVER), len(content) - 1)
        if first > last:
            raise Refusal(416, "Range not satisfiable")
        return Answer(
            content[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        )

    # The Hub

    def _answer(self, call: Call) -> Answer:
        match call.method, *call.segments:
            case "POST", "api", "validate-yaml":
                return self._validate_yaml(call.json()["content"])
            case ("POST" | "DELETE") as method, "api", "repos", ("create" | "delete"):
                name = f"{call.json().get('organization') or self._user(call)}/{call.json()['name']}"
                if method == "POST":
                    return self._create_repo(call, name)
                self._writable(call, self._visible(call, name))
                del self._repos[name]
                return Answer()
            case "GET", "api", "models":
                return self._list(call)
            case "GET", "api", "collections", owner, name:
                return self._collection(f"{owner}/{name}")
            case _, "api", "models", owner, name, *rest:
                return self._of_repo(call, self._visible(call, f"{owner}/{name}"), rest)
            case "GET", owner, name, "resolve", revision, *parts:
                return self._resolve(call, self._visible(call, f"{owner}/{name}"), revision, "/".join(parts))
            case "POST", owner, name, "info", "lfs", "objects", action:
                repo = self._visible(call, f"{owner}/{name.removesuffix('.git')}")
                self._user(call)
                return self._lfs_batch(repo, call.json()) if action == "batch" else self._lfs_verify(call.json())
        raise Refusal(404, "Not found")

    def _user(self, call: Call) -> str:
        if not call.user:
            raise Refusal(401, "Invalid username or password.")
        return call.user

    def _visible(self, call: Call, repo_id: str) -> Repo:
        repo = self._repos.get(repo_id)
        if not repo or (repo.private and call.user != repo.owner):
            # To nobody in particular the Hub does not tell what is private from what is not there.
            raise Refusal(404 if call.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _ungated(self, call: Call, repo: Repo) -> None:
        if repo.gated and call.user not in {repo.owner, *repo.granted}:
            message = f"Access to model {repo.id} is restricted. You must have access to it and be authenticated."
            raise Refusal(403 if call.user else 401, message, "GatedRepo")

    def _writable(self, call: Call, repo: Repo, author: str | None = None) -> None:
        if self._user(call) not in {repo.owner, author}:
            raise Refusal(403, f"You are not the owner of {repo.id}.")

    def _may_push(self, call: Call, repo: Repo, revision: str) -> None:
        """Everybody may open a pull request and push to it; only the owner to what is not one."""
        pull = repo.pulls.get(int(revision.removeprefix("refs/pr/"))) if revision.startswith("refs/pr/") else None
        self._writable(call, repo, call.user if call.query.get("create_pr") else pull.author if pull else None)

    def _validate_yaml(self, content: str) -> Answer:
        matter = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        if not matter:
            return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        if "\n\t" in f"\n{matter[1]}":
            return as_json({"errors": [{"message": "tabs must not be used in indentation"}], "warnings": []}, 400)
        return as_json({"errors": [], "warnings": []})

    def _create_repo(self, call: Call, repo_id: str) -> Answer:
        if repo_id.split("/")[0] != self._user(call):
            raise Refusal(403, f"You don't have the rights to create a repo under the namespace of {repo_id}.")
        exists = repo_id in self._repos
        repo = self._repos[repo_id] if exists else self._create(repo_id)
        url = f"{self.url}/{repo_id}"
        if exists:
            raise Refusal(409, "You already created this repo", url=url)
        asked = call.json()
        repo.private = asked.get("visibility") == "private" or asked.get("private", False)
        return as_json({"url": url})

    def _create(self, repo_id: str) -> Repo:
        repo = self._repos[repo_id] = Repo(repo_id)
        files = {".gitattributes": self._store(".gitattributes", GIT_ATTRIBUTES)}
        self._commit(repo, "refs/heads/main", files, "initial commit", "", repo.owner)
        return repo

    def _of_repo(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        match call.method, *rest:
            case "GET", *revision if not revision or (revision[0] == "revision" and len(revision) == 2):
                return self._info(call, repo, repo.commit(revision[1] if revision else "main"))
            case "GET", "refs":
                return self._refs(call, repo)
            case "GET", ("xet-write-token" | "xet-read-token") as name, revision if self.xet:
                if name == "xet-read-token":
                    self._ungated(call, repo)
                else:
                    self._may_push(call, repo, revision)
                return self._xet_token(self.xet)
            case "POST", "preupload", revision:
                self._may_push(call, repo, revision)
                return self._preupload(repo.commit(revision), call.json()["files"])
            case "POST", "commit", revision:
                self._may_push(call, repo, revision)
                return self._commit_call(call, repo, revision)
            case "POST", "branch", name:
                self._writable(call, repo)
                if name.startswith("refs/"):
                    raise Refusal(400, f"Invalid reference for a branch: {name}")
                return self._set_ref(repo, f"refs/heads/{name}", call.json().get("startingPoint", "main"))
            case "POST", "tag", revision:
                self._writable(call, repo)
                return self._set_ref(repo, f"refs/tags/{call.json()['tag']}", revision)
            case "POST", "discussions", number, "merge":
                self._writable(call, repo)
                pull = repo.pulls[int(number)]
                files = dict(repo.commit(f"refs/pr/{number}").files)
                self._commit(repo, "refs/heads/main", files, pull.title, pull.description, repo.owner)
                return as_json({})
        raise Refusal(404, "Not found")

    # Reading

    def _list(self, call: Call) -> Answer:
        """The repositories that have all the tags which are asked for, the newest first."""
        repos = [r for r in self._repos.values() if not r.private or r.owner == call.user]
        listed: list[dict[str, Any]] = [
            {"id": r.id, "private": r.private, "tags": self._tags(r), "downloads": 0} for r in reversed(repos)
        ]
        return self._page(call, [entry for entry in listed if set(call.filters) <= set(entry["tags"])])

    def _collection(self, slug: str) -> Answer:
        if slug not in self.collections:
            raise Refusal(404, "Collection not found")
        items = [
            {"_id": f"{position:024x}", "type": kind, "id": name, "position": position}
            for position, (kind, name) in enumerate(self.collections[slug])
        ]
        about = {"slug": slug, "title": slug, "owner": {"name": slug.split("/")[0]}, "items": items, "position": 0}
        more = {"lastUpdated": "2025-06-15T12:00:00.000Z", "private": False, "theme": "blue", "upvotes": 0}
        return as_json({**about, **more})

    def _tags(self, repo: Repo) -> list[str]:
        """Tags that the Hub makes of the YAML in a repository's card."""
        fields = self._card(repo.commit("main"))
        bases = fields.get("base_model") or []
        bases = [bases] if isinstance(bases, str) else bases
        relation = fields.get("base_model_relation")
        tags = [*fields.get("tags", []), *([fields["library_name"]] if "library_name" in fields else [])]
        tags += [f"base_model:{base}" for base in bases]
        tags += [f"base_model:{relation}:{base}" for base in bases if relation]
        return list(dict.fromkeys(tags))

    def _card(self, commit: Commit) -> dict[str, Any]:
        """The YAML in a commit's card, as far as it can be read."""
        card = commit.files.get("README.md")
        text = self._read(card).decode(errors="replace") if card else ""
        matter = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        try:
            fields = yaml.safe_load(matter[1]) if matter else {}
        except (yaml.YAMLError, ValueError):
            fields = {}
        return fields if isinstance(fields, dict) else {}

    def _info(self, call: Call, repo: Repo, commit: Commit) -> Answer:
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if call.query.get("blobs"):
            for sibling, blob in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": blob.size, "blobId": blob.oid}
                if blob.sha256:
                    sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}
        return as_json(
            {
                "_id": git_oid(repo.id.encode())[:24],
                "id": repo.id,
                "sha": commit.oid,
                "author": repo.owner,
                "private": repo.private,
                "gated": repo.gated,
                "disabled": False,
                "lastModified": commit.date,
                "createdAt": repo.history("main")[-1].date,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "cardData": self._card(commit),
                "siblings": siblings,
            }
        )

    def _page(self, call: Call, items: list[Any]) -> Answer:
        first = int(call.query.get("cursor", 0))
        last = first + self.page_size
        link = {"Link": f'<{self.url}{call.url(cursor=str(last))}>; rel="next"'} if last < len(items) else {}
        return as_json(items[first:last], headers=link)

    def _refs(self, call: Call, repo: Repo) -> Answer:
        def under(folder: str) -> list[dict[str, str]]:
            names = sorted(name for name in repo.refs if name.startswith(folder))
            return [{"name": n.removeprefix(folder), "ref": n, "targetCommit": repo.refs[n]} for n in names]

        pulls = {"pullRequests": under("refs/pr/")} if call.query.get("include_prs") else {}
        return as_json({"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": [], **pulls})

    def _resolve(self, call: Call, repo: Repo, revision: str, path: str) -> Answer:
        self._ungated(call, repo)
        commit = repo.commit(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            refusal = Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
            refusal.headers |= headers
            raise refusal
        blob = commit.files[path]
        headers["ETag"] = f'"{blob.oid}"'
        if not blob.sha256:
            return self._ranged(call, self._contents[blob.oid], headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        if self.xet and (known := self.xet.find(blob.sha256)):
            route = f"{self.url}/api/models/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": known[0], "Link": f'<{route}>; rel="xet-auth"'}
        headers["Location"] = f"{self.cdn}/files/{blob.sha256}/{quote(path)}"
        return Answer(status=302, headers=headers)

    def _read(self, blob: Blob) -> bytes:
        if blob.etag in self._contents:
            return self._contents[blob.etag]
        known = self.xet.find(blob.etag) if self.xet else None
        if not self.xet or not known:
            raise Refusal(404, f"No content {blob.etag}")
        return self.xet.read(*known)

    # Writing

    def _store(self, path: str, content: bytes) -> Blob:
        if not is_lfs(path, len(content)):
            oid = git_oid(content)
            self._contents[oid] = content
            return Blob(oid, len(content), None)
        blob = lfs_blob(hashlib.sha256(content).hexdigest(), len(content))
        if self.xet:
            self.xet.add(content)
        else:
            self._contents[blob.etag] = content
        return blob

    def _size(self, sha256: str) -> int | None:
        """The size of a large file that has arrived, None if it has not."""
        if sha256 in self._contents:
            return len(self._contents[sha256])
        known = self.xet.find(sha256) if self.xet else None
        return known[1] if known else None

    def _preupload(self, commit: Commit, files: list[dict[str, Any]]) -> Answer:
        answers = []
        for file in files:
            current = commit.files.get(file["path"])
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            oid = current.etag if current else None
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": answers})

    def _lfs_batch(self, repo: Repo, batch: dict[str, Any]) -> Answer:
        objects = []
        for wanted in batch["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            upload: dict[str, Any] = {"href": f"{self.cdn}/upload/{oid}"}
            verify = {"href": f"{self.url}/{repo.id}.git/info/lfs/objects/verify"}
            actions = {"actions": {"upload": upload, "verify": verify}} if self._size(oid) is None else {}
            objects.append({"oid": oid, "size": size, **actions})
        return as_json({"transfer": "basic", "objects": objects})

    def _lfs_verify(self, uploaded: dict[str, Any]) -> Answer:
        if self._size(uploaded["oid"]) != uploaded["size"]:
            raise Refusal(404, "The upload has not arrived.")
        return as_json({})

    def _xet_token(self, store: XetStore) -> Answer:
        # The client keeps a token until a minute before its end.
        end = int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": store.url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(end)}
        return as_json({"casUrl": store.url, "accessToken": "xet", "exp": end}, headers=headers)

    def _commit_call(self, call: Call, repo: Repo, revision: str) -> Answer:
        parent = repo.commit(revision)
        files = dict(parent.files)
        header: dict[str, Any] = {}
        for line in map(json.loads, call.body.splitlines()):
            match line:
                case {"key": "header", "value": header}:
                    pass
                case {"key": "file", "value": {"path": str() as path, "content": content}}:
                    content = base64.b64decode(content)
                    files[path] = Blob(git_oid(content), len(content), None)
                    self._contents[git_oid(content)] = content
                case {"key": "lfsFile", "value": {"path": str() as path, "oid": str() as oid, **more}}:
                    size = self._size(oid)
                    if size is None or more.get("size", size) != size:
                        raise Refusal(400, f"LFS object {oid} of {path} has not been uploaded.")
                    files[path] = lfs_blob(oid, size)
                case _:
                    raise Refusal(400, f"Unknown operation: {line}")
        if header.get("parentCommit") not in (None, parent.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        title, message, user = header["summary"], header.get("description", ""), self._user(call)
        answer = {}
        if call.query.get("create_pr"):
            number = self._open_pull(repo, user, revision, title, message)
            answer = {"pullRequestUrl": f"{self.url}/{repo.id}/discussions/{number}"}
            revision = f"refs/pr/{number}"
        commit = self._commit(repo, repo.branch(revision), files, title, message, user)
        url = f"{self.url}/{repo.id}/commit/{commit.oid}"
        return as_json({"success": True, "commitOid": commit.oid, "commitUrl": url, **answer})

    def _commit(self, repo: Repo, ref: str, files: dict[str, Blob], title: str, message: str, author: str) -> Commit:
        self._commits += 1
        parent = repo.refs.get(ref)
        described = f"{parent} {title} {self._commits} {sorted(files.items())}".encode(errors="surrogatepass")
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(1_750_000_000 + self._commits))
        commit = Commit(hashlib.sha1(described).hexdigest(), parent, title, message, author, date, files)
        repo.commits[commit.oid] = commit
        repo.refs[ref] = commit.oid
        return commit

    def _set_ref(self, repo: Repo, ref: str, revision: str) -> Answer:
        if ref in repo.refs:
            raise Refusal(409, f"Reference {ref} already exists")
        repo.refs[ref] = repo.commit(revision).oid
        return as_json({})

    def _open_pull(self, repo: Repo, user: str, base: str, title: str, description: str) -> int:
        number = len(repo.pulls) + 1
        repo.pulls[number] = PullRequest(title, description, user)
        repo.refs[f"refs/pr/{number}"] = repo.commit(base).oid
        return number


def _pairs(query: str) -> Iterator[tuple[str, str]]:
    for name, values in parse_qs(query).items():
        yield name, values[-1]


class _Listener(socketserver.TCPServer):
    """A port of the Hub; every connection has a thread of its own."""

    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, origin: Literal["hub", "cdn"]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.origin = origin
        self.connections: dict[socket.socket, threading.Thread] = {}

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self._talk, args=(request, client_address), daemon=True)
        self.connections[request] = thread
        thread.start()

    def _talk(self, request: socket.socket, client_address: Any) -> None:
        # A client may hang up at any time, and so may the Hub that is stopped.
        try:
            self.finish_request(request, client_address)
        except ConnectionError:
            pass
        finally:
            self.shutdown_request(request)

    def close(self) -> None:
        self.server_close()
        for connection, thread in self.connections.items():
            # Most have ended by themselves.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body leave as one packet: the second would wait 40 ms for the first one's acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Listener

    def answer(self) -> None:
        body = self._body()
        responded = self.server.hub.respond(self.server.origin, self.command, self.path, self.headers, body)
        if responded is None:
            self.close_connection = True
            return
        answer, truncate = responded
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content[:truncate])
            self.close_connection = self.close_connection or truncate is not None

    do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to the terminal: `HubServer.log` has it."""
