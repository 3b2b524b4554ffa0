"""Puts a distilled set on the Hugging Face hub, as a data set that `datasets` reads and that holds the set exactly."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dstill.artifacts import card
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.exporting import export
from dstill.errors import DstillError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_KIND = "dataset"  # of repositories, as the client calls it
_LONGEST = 200  # characters of a message of the hub that are repeated


def push_to_hub(
    distilled: DistilledSet,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Uploads a set to the Hugging Face hub. The data set is made there if it is missing.

    What is uploaded is the export `hf`: Parquet, a card, a picture, Croissant metadata, and `distilled.safetensors`, which
    holds everything. Files of an earlier upload are replaced; the hub keeps their history.

    Args:
        distilled: the set.
        repo_id: `OWNER/NAME` of the data set, where OWNER is you or an organisation of yours.
        private: make it visible to its owner only.
        token: a token that may write; that of the client's login or of `HF_TOKEN` if left out.
        revision: the branch to write to, made if missing; `main` if left out.
        endpoint: address of the hub; that of `HF_ENDPOINT`, or the public one, if left out.

    Returns:
        The address of the data set.

    Raises:
        DstillError: the client is not installed; the whitening of the set was not found; the hub cannot be reached, does not
            accept the token, or refuses the name; the data set holds other data; or it is to be private and is public already.

    Example:
        >>> import dstill
        >>> syn = dstill.distill("digits", method="random", recipe="smoke", progress=False)
        >>> dstill.push_to_hub(syn, "me/tiny-digits", private=True)  # doctest: +SKIP
        'https://huggingface.co/datasets/me/tiny-digits'
    """
    api = _client(token, endpoint)
    if repo_id.count("/") != 1:
        raise DstillError(f"{repo_id!r} does not name a data set on the hub: pass OWNER/NAME")
    with tempfile.TemporaryDirectory(prefix="dstill-") as temporary:
        # Before the hub is asked, so that a set that cannot be exported leaves nothing there.
        folder = export(distilled, "hf", Path(temporary) / "set")
        with _told(api.endpoint, repo_id):
            api.create_repo(repo_id, repo_type=_KIND, private=private or None, exist_ok=True)
            if private and not api.repo_info(repo_id, repo_type=_KIND).private:
                raise DstillError(f"{repo_id} exists and is public: make it private on the hub first, or pass another name")
            if revision is not None:
                api.create_branch(repo_id, branch=revision, repo_type=_KIND, exist_ok=True)
            _check_holds_nothing_else(api.list_repo_files(repo_id, repo_type=_KIND, revision=revision), repo_id)
            message = f"Upload {card.described(distilled)}"
            api.upload_folder(repo_id=repo_id, repo_type=_KIND, folder_path=folder, revision=revision, commit_message=message)
    return f"{api.endpoint}/datasets/{repo_id}" + (f"/tree/{revision}" if revision else "")


def _client(token: str | None, endpoint: str | None) -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise DstillError("huggingface_hub is not installed: pip install 'dstill[hub]'") from error
    return HfApi(endpoint=endpoint, token=token)


def _check_holds_nothing_else(paths: list[str], repo_id: str) -> None:
    """Refuses a data set whose other files would be read together with ours, since the card names all of `data/`."""
    others = sorted(path for path in paths if path.startswith("data/") and path != card.SHARD)
    if others:
        raise DstillError(f"{repo_id} holds other data ({others[0]}): pass another name, or remove them on the hub")


@contextlib.contextmanager
def _told(endpoint: str, repo_id: str) -> Iterator[None]:
    """Turns the errors of the client into sentences."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The base of its error for answers is also that of its HTTP library's errors, of which releases have had three.
    http = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    try:
        yield
    except DstillError:
        raise
    except OfflineModeIsEnabled as error:
        raise DstillError("the client of the hub is told to stay offline: unset HF_HUB_OFFLINE to upload") from error
    except HfHubHTTPError as error:
        raise DstillError(_refusal(error, endpoint, repo_id)) from error
    except ValueError as error:
        raise DstillError(f"{repo_id!r} was refused by the client of the hub: {_first_line(error)}") from error
    except (http, OSError, RuntimeError) as error:
        raise DstillError(f"{endpoint} cannot be reached: {_first_line(error)}. Is there a network?") from error


def _refusal(error: Exception, endpoint: str, repo_id: str) -> str:
    """What to do about an answer of the hub that is no success."""
    status = error.response.status_code  # type: ignore[attr-defined]
    if status == 401:
        return f"{endpoint} asks who you are (401): run `hf auth login`, or set HF_TOKEN to a token that may write"
    if status == 403:
        return f"{endpoint} does not let you write to {repo_id} (403): use a token that may write, and an OWNER of your own"
    return f"{endpoint} refused {repo_id} ({status}): {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:_LONGEST].rstrip(".")
