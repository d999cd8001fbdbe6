"""Libraries that hf_slim works with where they are installed: peft, trl, DeepSpeed, bitsandbytes."""

from hf_slim.integration.upstream.row import Check, Upstream

ADAPTERS = "quantization/layers/merged_adapters.py"
LIVE = "distillation/teachers/live.py"
SHARDING = "distillation/teachers/sharding.py"
LORA = "peft.tuners.lora.layer.Linear"
TUNER_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"

OPTIONAL_LIBRARIES = (
    # peft
    Upstream(
        f"{TUNER_LAYER}.get_base_layer", "0.21", ("core/adapters.py",),
        "An adapter keeps the layer that it wraps as `base_layer`. Under another name adapters are taken for parts of "
        "the model.",
        Check.SAYS, ("base_layer",),
    ),
    Upstream(
        f"{LORA}.forward", "0.21", (ADAPTERS,),
        "Replaced on an adapter around a fake-quantized layer: the sum of both is rounded.",
    ),
    Upstream(
        f"{LORA}.get_delta_weight", "0.21", (ADAPTERS,),
        "What an adapter adds to the weight.",
        Check.TAKES, ("adapter",),
    ),
    Upstream(
        f"{LORA}.merge", "0.21", (ADAPTERS,),
        "Adapters around ordinary layers are merged before packing.",
    ),
    Upstream(
        "peft.tuners.lora.layer.LoraLayer.lora_A", "0.21", (ADAPTERS,),
        "Tells which adapters this layer has.",
        Check.SETS,
    ),
    Upstream(
        "peft.tuners.lora.layer.LoraLayer.in_features", "0.21", ("pruning/removal/cut.py",),
        "An adapter keeps the sizes of its layer, which shrink with it.",
        Check.SETS,
    ),
    Upstream(
        f"{TUNER_LAYER}.active_adapters", "0.21", (ADAPTERS,),
        "The adapters that count.",
    ),
    Upstream(
        f"{TUNER_LAYER}.disable_adapters", "0.21", (ADAPTERS,),
        "Tells whether adapters are taken off, as while a student teaches itself.",
    ),
    Upstream(
        f"{TUNER_LAYER}.merged", "0.21", (ADAPTERS,),
        "Tells whether an adapter is in the weight already.",
    ),
    Upstream(
        f"{TUNER_LAYER}.enable_adapters", "0.21", (LIVE,),
        "Takes the adapter of the output layer off while the teacher's logits are computed.",
        Check.TAKES, ("enabled",),
    ),
    Upstream(
        "peft.PeftModel.get_base_model", "0.21", ("core/record.py",),
        "Gives the model inside the wrapper.",
    ),
    Upstream(
        "peft.PeftModel.disable_adapter", "0.21",
        ("core/adapters.py", "distillation/teachers/loading.py"),
        "A LoRA student without its adapters is its own teacher.",
    ),
    Upstream(
        "peft.tuners.tuners_utils.BaseTuner.disable_adapter_layers", "0.21", ("distillation/callback.py",),
        "A copy that teaches has its adapters off for good.",
    ),
    Upstream(
        "peft.PeftModelForCausalLM.generate", "0.21", ("distillation/on_policy.py",),
        "Hands the wrapper's `generation_config` to the model inside, so both are replaced.",
        Check.SAYS, ("generation_config = self.generation_config",),
    ),
    # trl
    Upstream(
        "trl.SFTTrainer.compute_loss", "1.16", ("distillation/distiller.py", LIVE),
        "Tells the model with `fused_lm_head` to make no logits, and computes a loss of its own.",
        Check.SAYS, ("fused_lm_head",),
    ),
    Upstream(
        "trl.trainer.utils.add_fused_lm_head", "1.16", (LIVE,),
        "Puts a bound `forward` on the model, which a copy must not keep: it calls the model that it was made for.",
        Check.SAYS, ("model.forward = types.MethodType",),
    ),
    # DeepSpeed
    Upstream(
        "deepspeed.zero.GatheredParameters", "0.19", (SHARDING,),
        "Makes partitioned weights whole for a while.",
        Check.TAKES, ("params",),
    ),
    Upstream(
        "deepspeed.initialize", "0.19", (SHARDING,),
        "Partitions a teacher.",
        Check.TAKES, ("model", "config"),
    ),
    Upstream(
        "deepspeed.runtime.zero.partition_parameters.Init", "0.19", (SHARDING,),
        "Marks a partitioned weight with `ds_id`.",
        Check.SAYS, ("param.ds_id = ",),
    ),
    # bitsandbytes
    Upstream(
        "bitsandbytes.functional.dequantize_4bit", "0.50", ("quantization/layers/families.py",),
        "Reads the weight under a QLoRA adapter.",
        Check.TAKES, ("A", "quant_state"),
    ),
    Upstream(
        "bitsandbytes.nn.Linear4bit", "0.50", ("quantization/layers/families.py",),
        "Such layers are known by the name of their class.",
    ),
    Upstream(
        "bitsandbytes.nn.Params4bit.quant_state", "0.50", ("quantization/layers/families.py",),
        "Is there once the weight is quantized.",
        Check.SETS,
    ),
    Upstream(
        "bitsandbytes.backends.cpu.ops", "0.50", ("workflows/verbosity.py",),
        "Warns in every process that an optional kernel is missing; the name of its logger filters the warning out.",
        Check.SAYS, ("kernels-community",),
    ),
)  # fmt: skip
