"""Optional libraries that hf_slim supports: peft, trl, DeepSpeed, bitsandbytes."""

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
        "An adapter stores the layer that it wraps as `base_layer`. With another name, adapters are treated as parts "
        "of the model.",
        Check.SAYS, ("base_layer",),
    ),
    Upstream(
        f"{LORA}.forward", "0.21", (ADAPTERS,),
        "Replaced in an adapter around a fake-quantized layer, so that the sum of both is rounded.",
    ),
    Upstream(
        f"{LORA}.get_delta_weight", "0.21", (ADAPTERS,),
        "Returns the change that an adapter adds to the weight.",
        Check.TAKES, ("adapter",),
    ),
    Upstream(
        f"{LORA}.merge", "0.21", (ADAPTERS,),
        "Adapters around ordinary layers are merged before packing.",
    ),
    Upstream(
        "peft.tuners.lora.layer.LoraLayer.lora_A", "0.21", (ADAPTERS,),
        "Contains the names of the adapters of a layer.",
        Check.SETS,
    ),
    Upstream(
        "peft.tuners.lora.layer.LoraLayer.in_features", "0.21", ("pruning/removal/cut.py",),
        "An adapter stores the sizes of its layer, which become smaller when the layer is pruned.",
        Check.SETS,
    ),
    Upstream(
        f"{TUNER_LAYER}.active_adapters", "0.21", (ADAPTERS,),
        "Names of the adapters that are used.",
    ),
    Upstream(
        f"{TUNER_LAYER}.disable_adapters", "0.21", (ADAPTERS,),
        "Tells whether adapters are disabled, for example while the student without adapters is the teacher.",
    ),
    Upstream(
        f"{TUNER_LAYER}.merged", "0.21", (ADAPTERS,),
        "Tells whether an adapter is already merged into the weight.",
    ),
    Upstream(
        f"{TUNER_LAYER}.enable_adapters", "0.21", (LIVE,),
        "Disables the adapter of the output layer while the teacher's logits are computed.",
        Check.TAKES, ("enabled",),
    ),
    Upstream(
        "peft.PeftModel.get_base_model", "0.21", ("core/record.py",),
        "Returns the model inside the wrapper.",
    ),
    Upstream(
        "peft.PeftModel.disable_adapter", "0.21",
        ("core/adapters.py", "distillation/teachers/loading.py"),
        "Disables the adapters of a LoRA student, so that the base model is the teacher.",
    ),
    Upstream(
        "peft.tuners.tuners_utils.BaseTuner.disable_adapter_layers", "0.21", ("distillation/callback.py",),
        "Disables the adapters of a copy that is the teacher.",
    ),
    Upstream(
        "peft.PeftModelForCausalLM.generate", "0.21", ("distillation/on_policy.py",),
        "Passes the wrapper's `generation_config` to the model inside, so both are replaced.",
        Check.SAYS, ("generation_config = self.generation_config",),
    ),
    # trl
    Upstream(
        "trl.SFTTrainer.compute_loss", "1.16", ("distillation/distiller.py", LIVE),
        "With `fused_lm_head` the model computes no logits, and the trainer computes the loss.",
        Check.SAYS, ("fused_lm_head",),
    ),
    Upstream(
        "trl.trainer.utils.add_fused_lm_head", "1.16", (LIVE,),
        "Sets a bound `forward` on the model, which is removed from copies, because it calls the original model.",
        Check.SAYS, ("model.forward = types.MethodType",),
    ),
    # DeepSpeed
    Upstream(
        "deepspeed.zero.GatheredParameters", "0.19", (SHARDING,),
        "Gathers partitioned weights temporarily.",
        Check.TAKES, ("params",),
    ),
    Upstream(
        "deepspeed.initialize", "0.19", (SHARDING,),
        "Partitions the weights of a teacher.",
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
        "Dequantizes the weight under a QLoRA adapter.",
        Check.TAKES, ("A", "quant_state"),
    ),
    Upstream(
        "bitsandbytes.nn.Linear4bit", "0.50", ("quantization/layers/families.py",),
        "These layers are recognised by the name of their class.",
    ),
    Upstream(
        "bitsandbytes.nn.Params4bit.quant_state", "0.50", ("quantization/layers/families.py",),
        "It exists once the weight is quantized.",
        Check.SETS,
    ),
    Upstream(
        "bitsandbytes.backends.cpu.ops", "0.50", ("workflows/verbosity.py",),
        "Warns in every process that an optional kernel is missing; the warning is filtered by the name of its "
        "logger.",
        Check.SAYS, ("kernels-community",),
    ),
)  # fmt: skip
