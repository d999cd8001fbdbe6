"""A model in a folder, uploaded to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from hf_slim.hub.push import Pushed, push_folder
from hf_slim.progress import progress_is_shown


def push(folder: str | Path, repo_id: str, private: bool = False, revision: str | None = None) -> Pushed:
    """Uploads a finished model to the Hub with its card and its report, as one commit: `hf-slim push`.

    Nothing in the folder changes, and a push that failed can be repeated. The card is the folder's README.md if
    somebody has edited it, and is otherwise written from report.json for this repository.

    Args:
        folder: That `hf-slim train` or `save_pretrained` has written.
        repo_id: `user/name`; made if it is not there.
        private: The repository must be private; an existing public one is refused.
        revision: Branch to push to, made if it is not there; None: main.
    Returns: the address, the commit, and the names of the files that were sent and left out.

    Raises:
        SlimConfigError: for a name that the Hub does not allow.
        SlimLoadError: if the folder holds no finished model, or a report about other weights.
        SlimHubError: if there is no token, or the Hub refuses or does not answer.
    """
    if not progress_is_shown():
        disable_progress_bars()
    return push_folder(folder, repo_id, private, revision)
