"""The upload of a finished model to the Hub: one commit, all of it or nothing, with another try after a failure."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hf_slim.core.errors import SlimConfigError, SlimHubError, is_own_mistake
from hf_slim.hub.card import is_untouched, render_card
from hf_slim.hub.facts import recipe_of
from hf_slim.hub.folder import CARD, PICTURE, ModelFolder, bare_report, read_folder
from hf_slim.version import __version__

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
ATTEMPTS, FIRST_WAIT_S = 3, 2.0  # the library itself repeats uploads of files, and not the commit
PASSING = (408, 429, 500, 502, 503, 504)  # status codes of failures that may pass
WEIGHTS = (".safetensors", ".safetensors.index.json")
ADVICE = {
    401: "The token was not accepted. Log in again with `hf auth login`, or set HF_TOKEN.",
    403: "The token may not write there. Use a token with write permission, and your own name or an organization of "
         "yours.",
    404: "Check the name and the revision, and that the token may write there.",
}  # fmt: skip
AGAIN = "The folder is unchanged. Run the same command again; files that have arrived are not sent twice."


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: Of the repository, at the revision.
        commit: Hash of the commit.
        files: Names of the files that the repository now has from the folder.
        left_out: Names of what lies in the folder and was not sent.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def push_folder(folder: str | Path, repo_id: str, private: bool = False, revision: str | None = None) -> Pushed:
    """Uploads a finished model with its card and its report; nothing in the folder changes.

    A card that somebody has edited is sent as it is; any other is written for this repository. Weights of an earlier
    model that this one does not have are deleted in the same commit.

    Args:
        folder: Of the model.
        repo_id: `user/name`; the repository is made if it is not there.
        private: The repository must be private: it is made so, and an existing public one is refused.
        revision: Branch, made if it is not there; None: main.

    Raises:
        SlimConfigError: for a name that the Hub does not allow.
        SlimLoadError: if the folder holds no finished model.
        SlimHubError: if there is no token, or the Hub refuses or does not answer.
    """
    _check_name(repo_id)
    model = read_folder(folder)
    token = get_token()
    if token is None:
        raise SlimHubError("There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
    if model.report is None:
        logger.warning(
            "'%s' has no report.json, so the card has no numbers. `hf-slim eval ... --json` writes one.", folder
        )
    _warn_of_paths(model)
    api = HfApi(token=token, library_name="hf_slim", library_version=__version__)
    _attempt(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), repo_id)
    if private and not _attempt(lambda: api.model_info(repo_id), repo_id).private:
        raise SlimHubError(
            f"'{repo_id}' exists already and is public. Choose another name, or make it private in its settings."
        )
    if revision not in (None, "main"):
        _attempt(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    contents = dict(_contents(model, repo_id, revision))
    commit = _attempt(lambda: _commit(api, repo_id, revision, contents), repo_id)
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")
    return Pushed(url, commit, tuple(contents), model.left_out)


def _contents(model: ModelFolder, repo_id: str, revision: str | None) -> Iterator[tuple[str, Path | bytes]]:
    """Every file of the repository: name -> a path, or bytes of a card that is written for it."""
    yield from ((name, model.path / name) for name in model.files if name != CARD)
    card = model.path / CARD
    if card.is_file() and not is_untouched(card.read_text("utf-8")):
        yield CARD, card
        return
    report = model.report or bare_report(model.path)
    yield CARD, render_card(report, repo_id, PICTURE in model.files, revision).encode()


def _commit(api: HfApi, repo_id: str, revision: str | None, contents: dict[str, Path | bytes]) -> str:
    there = api.list_repo_files(repo_id, revision=revision)
    stale = [name for name in there if name.endswith(WEIGHTS) and name not in contents]
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    message = "Upload model with hf_slim"
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision).oid


def _attempt(call: Callable[[], Result], repo_id: str) -> Result:
    """The result of a request, tried again after failures that may pass. Raises SlimHubError for all others."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except OfflineModeIsEnabled as error:
            raise SlimHubError("HF_HUB_OFFLINE is set, so the Hub cannot be reached. Unset it to push.") from error
        except Exception as error:
            if is_own_mistake(error):
                raise
            if attempt == ATTEMPTS or not _may_pass(error):
                raise _explained(error, repo_id) from error
            logger.warning("The Hub failed (%s); trying again.", _first_line(error))
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """Status code of the answer that an error is about; the library wraps some errors of uploads."""
    found = (cause.response.status_code for cause in _causes(error) if isinstance(cause, HfHubHTTPError))
    return next(found, None)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: the server failed, or there was no proper answer."""
    status = _status(error)
    if status is not None:
        return status in PASSING
    return any(isinstance(cause, HTTPError | json.JSONDecodeError) for cause in _causes(error))


def _explained(error: BaseException, repo_id: str) -> SlimHubError:
    status = _status(error)
    advice = ADVICE.get(status or 0, AGAIN)
    return SlimHubError(f"'{repo_id}' was not pushed: {_first_line(error)} {advice}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:") + "."


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SlimConfigError(f"'{repo_id}' is no name of a repository: {error} Write `user/name`.") from error
    if "/" not in repo_id:
        raise SlimConfigError(f"'{repo_id}' lacks the user or organization. Write `user/{repo_id}`.")


def _warn_of_paths(model: ModelFolder) -> None:
    """One warning for paths of this machine that the report would make public."""
    recipe = recipe_of(model.report or {})
    named = [recipe.get("model"), recipe.get("output"), recipe.get("data", {}).get("source")]
    if paths := [path for path in named if isinstance(path, str) and path.startswith(("/", "~"))]:
        logger.warning("report.json names paths of this machine, which everybody can read then: %s", ", ".join(paths))
