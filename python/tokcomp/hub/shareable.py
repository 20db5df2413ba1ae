"""save_pretrained and push_to_hub of anything that is a few files, and finding those files again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokcomp.hub.card import Card, write_card

#: Packages whose errors mean that there is no connection.
_CONNECTIONS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")


class Shareable:
    """Something that folders and repositories of the hub can hold, with a card that says what it is."""

    def _write_files(self, folder: Path) -> None:
        """Write all but the card into an existing folder."""
        raise NotImplementedError

    def _card(self) -> Card:
        """What the card says."""
        raise NotImplementedError

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> None:
        """Write into a folder, with a model card: ``README.md`` and its picture.

        A README that tokcomp did not write is kept. Every file is written whole or left as it was.

        Args:
            folder: made if it does not exist.
            push_to_hub: whether to upload it too.
            repo_id: where to; by default the folder's name in your own namespace.
            options: as for :meth:`push_to_hub`.

        Raises:
            NotADirectoryError: ``folder`` is a file.
            TypeError: options without ``push_to_hub``.
        """
        if not push_to_hub and (repo_id is not None or options):
            given = ", ".join(["repo_id"] * (repo_id is not None) + list(options))
            raise TypeError(f"push_to_hub must be True where {given} says how, got False")
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"folder must be a folder, got the file '{path}'; save() writes single files")
        path.mkdir(parents=True, exist_ok=True)
        self._write_files(path)
        write_card(path, self._card())
        if push_to_hub:
            _upload(path, repo_id or path.resolve().name, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload to a repository of the hub, which is made if there is none, with a model card.

        Args:
            repo_id: "owner/name", or "name" in your own namespace.
            private: of a new repository.
            token: a token with write access; by default the one of ``hf auth login``.
            revision: the branch.
            commit_message: of the commit.
            create_pr: open a pull request instead of committing.

        Returns:
            The address of the commit or pull request.

        Raises:
            ConnectionError: the hub cannot be reached, or offline mode is on.
            PermissionError: the token may not write there.
            ValueError: no name that a repository can have.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._write_files(Path(folder))
            write_card(Path(folder), self._card())
            return _upload(
                Path(folder),
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )


def fetch(
    name: str | os.PathLike[str],
    file: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The path of ``file`` in a local folder, or in a repository of the hub, downloaded into the cache if need be.

    Args:
        name: a folder, the file itself, or "owner/name" on the hub. What exists locally is taken.
        file: the file's name.
        revision: branch, tag or commit on the hub.
        token: for private repositories; by default the one of ``hf auth login``.
        cache_dir: instead of the hub's own cache.
        local_files_only: take what is in the cache, and ask no network.

    Raises:
        FileNotFoundError: the folder or the repository does not have the file, or there is no such repository.
        ConnectionError: it is not in the cache, and the hub cannot be or is not to be asked.
        ValueError: neither a folder nor a name that a repository can have.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file).is_file():
            raise FileNotFoundError(f"'{path}' must hold {file}, got a folder without it; save_pretrained writes one")
        return path / file
    from huggingface_hub import hf_hub_download

    offline = (
        f"'{name}' is no local folder, and {file} is not in the hub's cache, which is all that can be asked ({{}}); "
        "name a folder that save_pretrained wrote, or run once with a connection"
    )
    with _in_words(str(name), file, offline):
        found = hf_hub_download(
            str(name), file, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
    return Path(found)


def fetch_beside(found: Path, name: str | os.PathLike[str], file: str, **options: Any) -> Path:
    """Another file of the place where ``found`` was found by :func:`fetch`, on the hub of the same commit."""
    if Path(name).exists():
        return fetch(found.parent, file)
    if found.parent.parent.name == "snapshots":
        options["revision"] = found.parent.name
    return fetch(name, file, **options)


def _upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="tokcomp")
    offline = (
        f"'{repo_id}' cannot be written, since the hub cannot be asked ({{}}); save_pretrained writes a local folder, "
        "which can be uploaded later"
    )
    with _in_words(repo_id, "the upload", offline):
        # The whole name, with the namespace that was added to a short one.
        whole_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=whole_name,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload with tokcomp",
            create_pr=create_pr,
            allow_patterns=["*.json", "*.safetensors", "README.md", "tokens.png"],
        )
    return str(commit.pr_url or commit.commit_url)


@contextmanager
def _in_words(name: str, what: str, offline: str) -> Iterator[None]:
    """The hub's errors as Python's own, with what to do; ``offline`` has a place for the reason."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"'{name}' must be a local folder or a name on the hub, owner/name: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ConnectionError(offline.format(_first_line(error))) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"'{name}' on the hub must hold {what}, got a repository without it") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"'{name}' on the hub has no such revision: {_first_line(error)}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"'{name}' is neither a local folder nor a repository of the hub that this token may see; "
            "check the spelling, or log in with hf auth login"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        kind = PermissionError if status in (401, 403) else ConnectionError
        raise kind(f"the hub refused {what} of '{name}': {_first_line(error)}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in _CONNECTIONS:
            raise ConnectionError(offline.format(_first_line(error))) from error
        raise


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
