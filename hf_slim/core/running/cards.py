"""The way from a callback, which belongs to a technique, to the card of the model, which is made above all of them."""

import importlib

TABLE = "hf_slim.hub.trainer"  # defines `keep_card_`; looked up by name, because no technique may import it


def keep_card_(callback: object) -> None:
    """Has `trainer.push_to_hub` upload hf_slim's card instead of the Trainer's draft.

    Args:
        callback: That handles an event of this Trainer now.
    """
    importlib.import_module(TABLE).keep_card_(callback)
