"""Checkpoints on the hub: the plan from headers read by range, then one shard at a time, removed when it is consumed.

huggingface_hub finds the repository, its commit, sizes and hashes, the token and the endpoint. The bytes come over its
HTTP session and not through its download functions, because those start a shard again after an interruption.

Everything fetched lies in a work folder beside the output, laid out as the hub's own cache is, so that what tells a
checkpoint's origin by its folder (metadata.provenance) needs no second way.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from threading import Condition, Event, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hymoe import console
from hymoe.convert.checkpoint import Checkpoint, Files, Folder, Stored, StoredT, TensorRef
from hymoe.convert.writer import journal_of
from hymoe.errors import CheckpointError, HubError, ModelFileError, OutputError, UnsupportedError

if TYPE_CHECKING:
    import httpx2

# What a conversion reads besides weights.
SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json",
    "hy.tiktoken", "hunyuan.tiktoken", "tokenizer.json", "tokenizer.model", "model.safetensors.index.json",
)  # fmt: skip
MAX_SMALL_BYTES = 256 << 20
PIECE_BYTES = 1 << 20

# Shards on disk at a time: the one that is consumed and the one that is fetched meanwhile.
WINDOW = 2

# Seconds before each further try of a connection that gave no byte; any byte starts the row again.
BACKOFF = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
# Errors after which what was fetched is worth nothing.
FATAL = (CheckpointError, UnsupportedError, ModelFileError)
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
REPO_ID = re.compile(r"(?P<org>\w[\w.-]*)/(?P<name>\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
RUN_AGAIN = "run the same command again: it continues"


class _StoppedError(Exception):
    """The conversion ended before the download did."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit; `digest` is the sha256 of LFS files and git's blob id of others."""

    name: str
    size: int
    digest: str
    lfs: bool

    def hasher(self) -> hashlib._Hash:
        """Give the hash whose hexdigest over the content must equal `digest`."""
        return hashlib.sha256() if self.lfs else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit; its files come to `folder`. A checkpoint.Files.

    keep: leave consumed shards in the folder.
    """

    repo: str
    commit: str
    folder: Path
    files: Mapping[str, RemoteFile]
    keep: bool = False

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file, by name."""
        return {name: file.size for name, file in self.files.items()}

    def identity(self, name: str) -> str:
        """Name a file's content: the repository, its commit and the file's hash."""
        return f"{self.repo}@{self.commit} {name} {self.files[name].digest}"

    def read(self, name: str, start: int, count: int) -> bytes:
        """Read at most `count` bytes from byte `start` of a file on, over HTTP. Raises HubError where it cannot."""
        count = min(count, self.files[name].size - start)
        read = bytearray()
        retry = Retry(f"{self.repo}: {name}", Event())
        while len(read) < count:
            with retry, self._stream(name, start + len(read), start + count) as response:
                if response.status_code != 206:
                    raise HubError(f"{self.repo}: {name}", got="the whole file", expected="the range asked for")
                for piece in response.iter_bytes():
                    read += piece
                    retry.progress()
        return bytes(read[:count])

    def checkpoint(self, tensors: Mapping[str, TensorRef]) -> Checkpoint:
        """Give the checkpoint of these tensors, whose shards are fetched while it is read."""
        return Streamed(self.folder, tensors, repository=self)

    def fetch(self, name: str, stop: Event) -> Path:
        """Bring a file into the folder whole and verified, continuing a part of it that is there.

        A file of the wrong bytes is fetched once more. Raises HubError where that fails too, or the hub cannot be
        reached; OutputError where the disk is full; _StoppedError once `stop` is set.
        """
        file, target = self.files[name], self.folder / name
        part = target.with_name(f"{name}.part")
        digest = ""
        for again in (False, True):
            if target.exists():
                target.replace(part)  # from an earlier run, or not whole: it is read, hashed and completed
            if again:
                part.unlink(missing_ok=True)
                console.status(f"{name}: its hash is wrong; fetching it again")
            try:
                digest = self._download(file, part, stop)
            except OSError as exc:
                raise OutputError(f"{part}: {exc.strerror}", fix=f"free some space, then {RUN_AGAIN}") from exc
            if digest == file.digest:
                return part.replace(target)
        part.unlink(missing_ok=True)
        raise HubError(
            f"{self.repo}: {name}: damaged twice",
            got=f"hash {digest}",
            expected=file.digest,
            fix="something on the way changes the bytes; try later or from another network",
        )

    def _download(self, file: RemoteFile, part: Path, stop: Event) -> str:
        """Append to `part` until it is as long as the file; give its digest."""
        # Unbuffered, and pieces as they arrive: what a broken connection has given is kept.
        with part.open("ab", buffering=0) as out:
            hasher, have = _hashed(file, part)
            retry = Retry(f"{self.repo}: {file.name}", stop)
            while have < file.size:
                with retry, self._stream(file.name, have, file.size) as response:
                    if response.status_code != 206 or have > file.size:
                        out.truncate(0)
                        hasher, have = file.hasher(), 0
                    for piece in response.iter_bytes():
                        if stop.is_set():
                            raise _StoppedError
                        _write_all(out, piece)
                        hasher.update(piece)
                        have += len(piece)
                        retry.progress()
            if have > file.size:
                out.truncate(0)
                return f"of {have} bytes instead of {file.size}"
        return hasher.hexdigest()

    @contextmanager
    def _stream(self, name: str, start: int, end: int) -> Iterator[httpx2.Response]:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo, name, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with (
            _hub_errors(self.repo, self.commit),
            get_session().stream("GET", url, headers=headers, timeout=timeout) as response,
        ):
            hf_raise_for_status(response)
            yield response


def _write_all(out: RawIOBase, piece: bytes) -> None:
    left = memoryview(piece)
    while left:
        left = left[out.write(left) or 0 :]


def _hashed(file: RemoteFile, part: Path) -> tuple[hashlib._Hash, int]:
    """Hash what is there of a file; gives the hash and its length."""
    hasher, have = file.hasher(), 0
    with part.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            hasher.update(piece)
            have += len(piece)
    return hasher, have


class Retry:
    """Tries again what a network did not give: `with retry: …` swallows its failures, waiting longer each time.

    Any progress starts the waiting again from the beginning. Raises HubError when BACKOFF is used up.
    """

    def __init__(self, what: str, stop: Event) -> None:
        self.what = what
        self.failures = 0
        self._stop = stop
        self._moved = False

    def progress(self) -> None:
        """Say that bytes arrived."""
        self.failures = 0
        self._moved = True

    def __enter__(self) -> Self:
        self._moved = False
        return self

    def __exit__(self, _type: type[BaseException] | None, exc: BaseException | None, _tb: TracebackType | None) -> bool:
        if exc is None and self._moved:
            return False
        if exc is not None and not isinstance(exc, _TransientError):
            return False
        problem = exc or "the connection closed without a byte"
        if self.failures >= len(BACKOFF):
            raise HubError(f"{self.what}: {problem}", fix=f"when the network is back, {RUN_AGAIN}") from exc
        seconds = max(BACKOFF[self.failures], getattr(exc, "seconds", 0.0))
        self.failures += 1
        console.status(f"{self.what}: {problem}; trying again in {seconds:.0f} s")
        self._stop.wait(seconds)
        if self._stop.is_set():
            raise _StoppedError
        return True


class _TransientError(HubError):
    """A failure of the network or the server that may pass; `seconds`: how long the server asks to wait."""

    seconds = 0.0


@dataclass
class Streamed(Checkpoint):
    """A checkpoint whose shards are fetched in the background, at most WINDOW on disk, and removed when consumed."""

    repository: Repository = field(kw_only=True)
    _change: Condition = field(default_factory=Condition)
    _stop: Event = field(default_factory=Event)
    _left: Counter[Path] = field(default_factory=Counter)
    _ready: set[Path] = field(default_factory=set)
    _error: BaseException | None = None
    _thread: Thread | None = None

    @property
    def extra_disk(self) -> int:
        """Bytes of disk that shards take: the largest WINDOW neighbours, or all that are kept."""
        sizes = [self.repository.files[file.name].size for file in self._shards()]
        if self.repository.keep:
            return sum(sizes)
        return max((sum(sizes[i : i + WINDOW]) for i in range(len(sizes))), default=0)

    def arrange(self, pieces: Sequence[StoredT]) -> list[StoredT]:
        """Order the pieces by the last shard each needs, and begin to fetch. Shards that no piece needs stay away."""
        place = {file: i for i, file in enumerate(self._shards())}
        self._left = Counter(file for piece in pieces for file in _files(piece))
        for file in place:
            if file not in self._left and not self.repository.keep:
                file.unlink(missing_ok=True)  # consumed just before an interruption
        # A shard's last partner: the last shard that has to be there before all its pieces can be read.
        partner: dict[Path, int] = {}
        for piece in pieces:
            last = max((place[file] for file in _files(piece)), default=0)
            partner |= {file: max(last, partner.get(file, 0)) for file in _files(piece)}
        queue = sorted(self._left, key=place.__getitem__)
        self._thread = Thread(target=self._fetch_all, args=(queue, place, partner), daemon=True)
        self._thread.start()
        return sorted(pieces, key=lambda piece: max((place[file] for file in _files(piece)), default=0))

    def require(self, piece: Stored) -> None:
        """Return when the piece's shards are on disk, whole and verified. Raises HubError where they never will be."""
        needed = _files(piece)
        with self._change:
            self._change.wait_for(lambda: self._error is not None or needed <= self._ready)
            if not needed <= self._ready:
                assert self._error is not None
                raise self._error

    def finished(self, piece: Stored) -> None:
        """Say that the piece is consumed; with its last piece, a shard is removed (unless it is kept)."""
        with self._change:
            for file in _files(piece):
                self._left[file] -= 1
                if not self._left[file]:
                    self._close(file)
                    if not self.repository.keep:
                        file.unlink(missing_ok=True)
                    self._change.notify_all()

    def stop(self) -> None:
        """End the download, and let everyone who waits in `require` go."""
        self._stop.set()
        with self._change:
            self._error = self._error or _StoppedError()
            self._change.notify_all()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join(timeout=5)  # a connection that is silent right now may hold it longer
        super().__exit__(kind, exc, trace)

    def _shards(self) -> list[Path]:
        return sorted({ref.file for ref in self.tensors.values()})

    def _fetch_all(self, queue: Sequence[Path], place: Mapping[Path, int], partner: Mapping[Path, int]) -> None:
        try:
            for file in queue:
                with self._change:
                    self._change.wait_for(lambda file=file: self._may_fetch(place[file], partner))  # type: ignore[misc]
                if self._stop.is_set():
                    return
                self._fetch(file)
                with self._change:
                    self._ready.add(file)
                    self._change.notify_all()
        except _StoppedError:
            return
        except BaseException as exc:  # given to whoever waits in `require`
            with self._change:
                self._error = exc
                self._change.notify_all()

    def _may_fetch(self, place: int, partner: Mapping[Path, int]) -> bool:
        """Whether there is room, or none will come before the shard at `place` is there (pieces that span shards)."""
        held = [file for file in self._ready if self._left[file] and not self.repository.keep]
        return self._stop.is_set() or len(held) < WINDOW or all(partner[file] >= place for file in held)

    def _fetch(self, file: Path) -> None:
        size, begun = self.repository.files[file.name].size, time.monotonic()
        self.repository.fetch(file.name, self._stop)
        rate = size / max(time.monotonic() - begun, 1e-3)
        console.status(f"fetched {file.name}: {console.format_bytes(size)}, {console.format_bytes(rate)}/s")


def _files(piece: Stored) -> set[Path]:
    return {ref.file for ref in piece.refs}


# --- which repository ------------------------------------------------------------------------------------------------


@contextmanager
def located(
    model: str | Path, revision: str | None, out: Path | None, *, keep: bool = False, restart: bool = False
) -> Iterator[Files]:
    """Give the files of a checkpoint: a folder that exists, or a repository "org/name" or "org/name@revision".

    What is fetched goes to a work folder beside `out` (None: a temporary one, for a look at the plan). It is removed
    at the end, except with `keep` or where something interrupted a conversion that can be continued; `restart` begins
    with an empty one. Raises HubError or CheckpointError where there is no such checkpoint.
    """
    if Path(model).is_dir():
        if revision is not None:
            raise CheckpointError(f"{model}: --revision {revision}", got="a folder", expected="a repository's name")
        yield Folder(Path(model))
        return
    asked = REPO_ID.fullmatch(str(model))
    if asked is None:
        raise CheckpointError(
            f"{model}", got="no such folder", expected="the folder of a HunYuan checkpoint, or a repository as org/name"
        )
    repo, revision = f"{asked['org']}/{asked['name']}", revision or asked["revision"]
    if out is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield open_repository(repo, revision, Path(temporary))
        return
    with _work_folder(out, keep=keep, restart=restart) as work:
        yield open_repository(repo, revision, work, keep=keep)


@contextmanager
def _work_folder(out: Path, *, keep: bool, restart: bool) -> Iterator[Path]:
    """Make and lock the folder where the shards for `out` lie; remove it unless it is kept or worth continuing."""
    from filelock import FileLock, Timeout

    work = work_folder(out)
    work.mkdir(exist_ok=True)
    lock = FileLock(work / "lock", timeout=0)
    try:
        with lock:
            if restart:
                _empty(work)
            try:
                yield work
            except BaseException as exc:
                # Bad input leaves nothing, and neither does what ends before a byte of weights is here.
                begun = journal_of(out).exists()
                if isinstance(exc, FATAL) or not (begun or any(work.rglob("*.safetensors*"))):
                    shutil.rmtree(work, ignore_errors=True)
                elif not begun and not isinstance(exc, Exception):
                    console.warn(f"interrupted; {RUN_AGAIN}")
                raise
            if keep:
                console.status(f"the shards stay in {work}")
            else:
                shutil.rmtree(work, ignore_errors=True)
    except Timeout as exc:
        raise OutputError(f"{work}: another hy-convert is using it", fix="wait for it, or choose another name") from exc


def _empty(work: Path) -> None:
    for snapshots in work.glob("models--*"):
        shutil.rmtree(snapshots, ignore_errors=True)


def work_folder(out: Path) -> Path:
    """Where the shards for `out` lie while they are needed."""
    return out.with_name(f"{out.name}.hub")


def open_repository(repo: str, revision: str | None, work: Path, *, keep: bool = False) -> Repository:
    """Pin the repository's commit, list its files, and fetch those that hold no weights.

    Without a revision, one that an interrupted conversion has pinned in `work` goes on. Raises HubError.
    """
    _quiet()
    snapshots = work / f"models--{repo.replace('/', '--')}" / "snapshots"
    pinned = next((folder.name for folder in snapshots.glob("*") if COMMIT.fullmatch(folder.name)), None)
    commit, files = _list(repo, revision or pinned)
    found = Repository(repo, commit, snapshots / commit, files, keep)
    found.folder.mkdir(parents=True, exist_ok=True)
    console.status(f"{repo}, commit {commit[:12]}{', as before' if commit == pinned else ''}")
    for name in SMALL_FILES:
        if name in files and not (found.folder / name).is_file():
            if files[name].size > MAX_SMALL_BYTES:
                raise CheckpointError(f"{name}: size", got=files[name].size, expected=f"at most {MAX_SMALL_BYTES}")
            found.fetch(name, Event())
    return found


def _list(repo: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """Ask the hub for the commit of a revision and the files of its top folder."""
    from huggingface_hub import HfApi

    retry = Retry(repo, Event())
    info = None
    while info is None:
        with retry, _hub_errors(repo, revision):
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
            retry.progress()
    files = {}
    for entry in info.siblings or []:
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        if "/" not in entry.rfilename and digest is not None and entry.size is not None:
            files[entry.rfilename] = RemoteFile(entry.rfilename, entry.size, digest, entry.lfs is not None)
    if info.sha is None or not COMMIT.fullmatch(info.sha) or not files:
        raise HubError(repo, got="no commit or no files", expected="a model repository with files")
    return info.sha, files


def _quiet() -> None:
    """Only our console prints: the library's warnings about retries and tokens would double its lines."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the library's errors into one line each; those that may pass become _TransientError."""
    import httpx2
    from huggingface_hub import constants, errors

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as exc:
        page = f"{constants.ENDPOINT}/{repo}"
        raise HubError(f"{repo}: gated", got="no access", fix=f"accept its terms on {page}, then {log_in}") from exc
    except errors.RevisionNotFoundError as exc:
        raise HubError(f"{repo}: no revision {revision}", fix="name a branch, a tag or a commit that it has") from exc
    except errors.RepositoryNotFoundError as exc:
        fix = f"check the spelling; if it is private, {log_in}"
        raise HubError(f"{repo}: no such folder, and no such repository on {constants.ENDPOINT}", fix=fix) from exc
    except errors.EntryNotFoundError as exc:
        raise HubError(f"{repo}: a file listed is not there (HTTP 404)", fix="try again later") from exc
    except errors.OfflineModeIsEnabled as exc:
        fix = "unset HF_HUB_OFFLINE, or give a folder"
        raise HubError(f"{repo}: no such folder, and the hub is off limits: HF_HUB_OFFLINE is set", fix=fix) from exc
    except errors.HFValidationError as exc:
        raise HubError(f"{repo}: not a repository's name", fix=f"{exc}") from exc
    except errors.HfHubHTTPError as exc:
        raise _http_error(repo, exc.response, log_in) from exc
    except httpx2.TransportError as exc:
        raise _TransientError(f"{constants.ENDPOINT}: {str(exc) or type(exc).__name__}") from exc


def _http_error(repo: str, response: httpx2.Response, log_in: str) -> HubError:
    status = response.status_code
    if status in TRANSIENT_STATUS:
        error = _TransientError(f"the hub answers HTTP {status}")
        wait = response.headers.get("Retry-After", "")
        error.seconds = min(float(wait), 300.0) if wait.isdigit() else 0.0
        return error
    if status in (401, 403):
        return HubError(f"{repo}: access refused (HTTP {status})", fix=f"the token may be wrong or too weak: {log_in}")
    return HubError(f"{repo}: the hub answers HTTP {status}", fix="try again later")
