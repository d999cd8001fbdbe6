"""The Hugging Face Hub's library, and how a Trainer pushes with it."""

from hf_slim.integration.upstream.row import Check, Upstream

TRAINER, PUSH = "hub/trainer.py", "hub/push.py"

HUB = (
    Upstream(
        "transformers.trainer.Trainer.push_to_hub", "5.23", (TRAINER,),
        "Tells callbacks first, then saves, writes its card and uploads the folder. In another order our card is not "
        "uploaded, or is about older weights.",
        Check.SAYS,
        ("callback_handler.on_push_begin", "self.save_model(", "self.create_model_card(", "upload_folder("),
    ),
    Upstream(
        "transformers.trainer.Trainer.create_model_card", "5.23", (TRAINER,),
        "Writes README.md into the output folder, over any that is there; a wrapper on the trainer writes ours after "
        "it.",
        Check.SAYS, ('os.path.join(self.args.output_dir, "README.md")', "write(model_card)"),
    ),
    Upstream(
        "transformers.trainer.Trainer.hub_model_id", "5.23", (TRAINER,),
        "The name on the Hub that the card's snippets load.",
        Check.SETS,
    ),
    Upstream(
        "transformers.trainer_callback.CallbackHandler.on_push_begin", "5.23",
        ("quantization/callback.py", "pruning/callback.py", "distillation/callback.py"),
        "The Trainer that fires it is found on the call stack.",
    ),
    Upstream(
        "transformers.PreTrainedModel.add_model_tags", "5.23", ("integration/config_json.py",),
        "A card that `model.push_to_hub` makes gets these tags.",
    ),
    Upstream(
        "huggingface_hub.errors.HTTPError", "2.4", (PUSH,),
        "The class of all failures of requests, those without an answer included: such a request is tried again.",
    ),
    Upstream(
        "huggingface_hub.HfApi.create_commit", "2.4", (PUSH,),
        "Adds and deletes files in one commit; files that the Hub has already are left out, so that a second try is "
        "cheap and makes no second commit.",
        Check.SAYS, ("_remote_oid == operation._local_oid", "_send_commit("),
    ),
)  # fmt: skip
