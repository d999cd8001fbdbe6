"""The Trainer of transformers, and the parts of accelerate that it uses."""

from hf_slim.integration.upstream.row import Check, Upstream

ATTACHING = "distillation/attaching.py"
SPEED = "evaluation/training_speed.py"

TRAINER = (
    # the loss
    Upstream(
        "transformers.trainer.Trainer.__module__", "5.23", (ATTACHING,),
        "The class of transformers among the bases of a trainer is found by its module. With another name, every "
        "trainer appears to have its own loss.",
        Check.EQUALS, ("transformers.trainer",),
    ),
    Upstream(
        "transformers.trainer.Trainer.compute_loss", "5.23", (ATTACHING, "distillation/callback.py"),
        "`attach` replaces this method of the trainer by a function that adds the distillation loss.",
        Check.TAKES, ("model", "inputs", "return_outputs", "num_items_in_batch"),
    ),
    Upstream(
        "transformers.trainer.Trainer.label_smoother", "5.23", (ATTACHING,),
        "A trainer with label smoothing replaces the model's loss, so the distillation loss is added to the "
        "trainer's.",
        Check.SETS,
    ),
    Upstream(
        "transformers.trainer.Trainer.compute_loss_func", "5.23", (ATTACHING,),
        "A trainer with a loss function replaces the model's loss; the function also decides how the loss is scaled.",
        Check.SETS,
    ),
    Upstream(
        "transformers.trainer.Trainer.training_step", "5.23", (ATTACHING, SPEED),
        "The distillation loss is scaled for the way in which the Trainer divides the loss. With another rule it has "
        "the wrong weight, without an error.",
        Check.SAYS,
        (
            "loss_is_scaled_for_ga", "model_accepts_loss_kwargs", "num_items_in_batch is not None",
            "compute_loss_func is not None", "/ self.current_gradient_accumulation_steps",
        ),
    ),
    Upstream(
        "transformers.trainer.Trainer.compute_loss", "5.23", (ATTACHING,),
        "The Trainer multiplies a loss that counts the items of all ranks by the number of ranks. The distillation "
        "loss is multiplied in the same way.",
        Check.SAYS, ("average_tokens_across_devices", "num_processes"),
    ),
    Upstream(
        "transformers.trainer.Trainer.loss_is_scaled_for_ga", "5.23", (ATTACHING,),
        "Tells whether the loss of a subclass is already divided by the number of micro-batches.",
    ),
    Upstream(
        "transformers.trainer.Trainer.model_accepts_loss_kwargs", "5.23", (ATTACHING, SPEED),
        "It is set to False for classifiers, whose loss ignores the Trainer's count; otherwise gradients become too "
        "large with gradient accumulation.",
        Check.SETS,
    ),
    Upstream(
        "transformers.trainer.Trainer.current_gradient_accumulation_steps", "5.23", (ATTACHING, SPEED),
        "The last step of an epoch accumulates fewer micro-batches; a single timed step sets it to 1.",
        Check.SETS,
    ),
    Upstream(
        "transformers.trainer.Trainer.accelerator", "5.23", (ATTACHING, SPEED),
        "Gives the number of ranks; wraps the model and clips gradients in a timed step.",
        Check.SETS,
    ),
    # callbacks and their state
    Upstream(
        "transformers.trainer.Trainer.callback_handler", "5.23", ("distillation/callback.py", SPEED),
        "The distillation callback moves itself to the front of the list, so that reporters get the values that it "
        "logs.",
        Check.SETS,
    ),
    Upstream(
        "transformers.trainer_callback.CallbackHandler.callbacks", "5.23", ("distillation/callback.py",),
        "The list is replaced by a list in another order.",
        Check.SETS,
    ),
    Upstream(
        "transformers.trainer_callback.CallbackHandler.optimizer", "5.23", (SPEED,),
        "Two trainers are timed with one optimizer, which must be passed to their callbacks.",
        Check.SETS,
    ),
    Upstream(
        "transformers.trainer_callback.CallbackHandler.call_event", "5.23",
        ("distillation/callback.py", "pruning/callback.py", "quantization/callback.py"),
        "Callbacks get model, tokenizer, optimizer and data from the arguments of events.",
        Check.SAYS, ("model=", "processing_class=", "optimizer=", "train_dataloader="),
    ),
    Upstream(
        "transformers.trainer.Trainer.log", "5.23", ("distillation/callback.py",),
        "An entry of `log_history` is written before `on_log` is called, so the callback adds its values to the last "
        "entry. With another order, they are added to the entry before.",
        Check.SAYS, ("log_history.append", "callback_handler.on_log"),
    ),
    Upstream(
        "transformers.trainer_callback.TrainerState.log_history", "5.23",
        ("core/running/logs.py", "workflows/train.py"),
        "Values that callbacks log are added to its last entry; the report shows them.",
        Check.SETS,
    ),
    Upstream(
        "transformers.trainer_callback.TrainerState.stateful_callbacks", "5.23", ("pruning/callback.py", SPEED),
        "The pruning callback reads its saved state from it, by its class name.",
        Check.SETS,
    ),
    Upstream(
        "transformers.trainer_callback.ExportableState.state", "5.23", ("pruning/callback.py",),
        "The Trainer calls it at every save; the state has \"args\" and \"attributes\".",
    ),
    Upstream(
        "transformers.trainer.Trainer._load_callback_state", "5.23", ("pruning/callback.py",),
        "Two callbacks of one class are saved as a list, for which the pruning callback raises an error.",
        Check.SAYS, ("isinstance(data, list)", '"args"', '"attributes"'),
    ),
    Upstream(
        "transformers.trainer.TRAINER_STATE_NAME", "5.23", ("pruning/callback.py", "workflows/stages.py"),
        "The mask of the best checkpoint is read from this file. The Trainer writes it last, so a checkpoint that "
        "has it is complete.",
        Check.EQUALS, ("trainer_state.json",),
    ),
    Upstream(
        "transformers.trainer_callback.TrainerState.best_model_checkpoint", "5.23", ("pruning/callback.py",),
        "Names the folder of the checkpoint that the Trainer loads at the end.",
        Check.SETS,
    ),
    Upstream(
        "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR", "5.23", ("workflows/stages.py",),
        "Checkpoints are found by the names of their folders.",
        Check.EQUALS, ("checkpoint",),
    ),
    # optimizer and arguments
    Upstream(
        "transformers.trainer.Trainer.get_decay_parameter_names", "5.23", ("quantization/layers/scale_holders.py",),
        "Scales are parameters of a subclass of nn.LayerNorm, because the Trainer applies no weight decay to that "
        "type. With another rule, scales decay, without an error.",
        Check.SAYS, ("nn.LayerNorm",),
    ),
    Upstream(
        "transformers.training_args.TrainingArguments.deepspeed_plugin", "5.23", ("distillation/callback.py",),
        "Gives the configuration of DeepSpeed, with which a teacher is sharded as well.",
        Check.SETS,
    ),
    Upstream(
        "transformers.training_args.TrainingArguments.distributed_state", "5.23", ("workflows/cache_teacher.py",),
        "Makes all other ranks wait while the first one writes.",
        Check.SETS,
    ),
    # accelerate
    Upstream(
        "accelerate.utils.DeepSpeedPlugin.deepspeed_config", "1.15", ("distillation/callback.py",),
        "The configuration of DeepSpeed with numbers instead of \"auto\".",
        Check.SETS,
    ),
    Upstream(
        "accelerate.utils.extract_model_from_parallel", "1.15", ("workflows/train.py",),
        "Removes the wrapper for mixed precision between two stages.",
        Check.TAKES, ("model", "keep_fp32_wrapper"),
    ),
    Upstream(
        "accelerate.Accelerator.prepare_model", "1.15", ("workflows/train.py", SPEED),
        "accelerate marks a prepared model with `_is_accelerate_prepared`. The mark is removed after a stage; "
        "otherwise the next stage trains in the precision of the first, without an error.",
        Check.SAYS, ("model._is_accelerate_prepared = True",),
    ),
    Upstream(
        "accelerate.big_modeling.dispatch_model", "1.15", ("distillation/teachers/live.py",),
        "Marks an offloaded model with `hf_device_map`; such a teacher is not moved to the student's device.",
        Check.SAYS, ("model.hf_device_map = ",),
    ),
)  # fmt: skip
