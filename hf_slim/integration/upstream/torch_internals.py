"""Private parts of torch: the dictionaries of nn.Module, kernels for integers, nodes of autograd."""

from hf_slim.integration.upstream.row import Check, Upstream

MODULE = "torch.nn.modules.module.Module"
CPU = "quantization/kernels/cpu.py"
MODULES = "core/modules.py"
MASKED_NORMS = "pruning/removal/masked_norms.py"
PROBE = "pruning/structure/probe.py"
LATENCY = "pruning/budget/latency.py"
TRAINING = "quantization/layers/training.py"
SHARDING = "distillation/teachers/sharding.py"
ON_POLICY = "distillation/on_policy.py"

TORCH = (
    # nn.Module
    Upstream(
        f"{MODULE}._parameters", "2.13",
        (
            MASKED_NORMS, "quantization/storage.py", "quantization/layers/packed.py", "vocabulary/rows.py",
            "export/codes.py",
        ),
        "Codes of three dimensions take the place of a weight, and narrow weights that of whole ones, without a check "
        "of shapes; a property may stand before them.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._buffers", "2.13", (MASKED_NORMS, "vocabulary/rows.py"),
        "Running statistics and biases are replaced by smaller ones.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._modules", "2.13", (TRAINING,),
        "A fake-quantized module gives up its quantizers and becomes plain again.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}.__getattr__", "2.13", (TRAINING,),
        "Is called only for what `__dict__` lacks, so a tensor that lies there is read instead of the parameter.",
    ),
    Upstream(
        f"{MODULE}._forward_hooks", "2.13",
        (MODULES, "distillation/losses/fused.py", LATENCY, PROBE),
        "Hooks that prepare a model are found and removed; copies to experiment with have none.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._forward_pre_hooks", "2.13",
        (MODULES, "distillation/losses/fused.py", "integration/kv_cache.py", LATENCY, PROBE),
        "The same for hooks that run before.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._forward_hooks_with_kwargs", "2.13", (MODULES,),
        "Remembers which hooks take keyword arguments; an entry of a hook that is gone would be left behind.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._forward_hooks_always_called", "2.13", (MODULES,),
        "The same for hooks that run after an error too.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}.register_forward_hook", "2.13", ("distillation/callback.py", MASKED_NORMS),
        "A hook that runs after an error too puts whole tensors back and closes what is open.",
        Check.TAKES, ("with_kwargs", "always_call"),
    ),
    Upstream(
        "torch.nn.LayerNorm.normalized_shape", "2.13", (MASKED_NORMS, "pruning/matrices.py"),
        "Shrinks with the channels of a norm.",
        Check.SETS,
    ),
    Upstream(
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear", "2.13", ("quantization/layers/families.py",),
        "The output projection of nn.MultiheadAttention is read without being called, so it stays in floating point.",
    ),
    # kernels
    Upstream(
        "torch.ops.aten._int_mm", "2.13", (CPU,),
        "Products of int8 codes: the fast path of w8a8.",
        Check.TAKES, ("self", "mat2"),
    ),
    Upstream(
        "torch.ops.aten._convert_weight_to_int4pack_for_cpu", "2.13", (CPU,),
        "Arranges codes of four bits for the kernel of w4a16.",
        Check.TAKES, ("self", "innerKTiles"),
    ),
    Upstream(
        "torch.ops.aten._weight_int4pack_mm_for_cpu", "2.13", (CPU,),
        "The kernel of w4a16 with groups.",
        Check.TAKES, ("self", "mat2", "qGroupSize", "qScaleAndZeros"),
    ),
    Upstream(
        "torch.ops.aten._weight_int8pack_mm", "2.13", (CPU,),
        "The kernel of w8a16.",
        Check.TAKES, ("self", "mat2", "scales"),
    ),
    Upstream(
        "torch.utils._python_dispatch.TorchDispatchMode", "2.13", ("core/counting.py",),
        "Matrix products outside known layers are seen operator by operator, and counted.",
    ),
    Upstream(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "2.13", ("core/counting.py",),
        "Fused attention is known by the start of its name, and counted from the shapes of its first three arguments.",
        Check.TAKES, ("query", "key", "value"),
    ),
    Upstream(
        "torch.backends.cpu.get_cpu_capability", "2.13", (CPU,),
        "\"AVX512\" tells that products of integers are fast.",
    ),
    # autograd and random numbers
    Upstream(
        "torch.autograd.graph.Node.next_functions", "2.13", ("pruning/structure/hidden_width.py",),
        "The graph is walked to see what a tensor was computed from.",
    ),
    Upstream(
        "torch._C._functions.AccumulateGrad.variable", "2.13", ("pruning/structure/hidden_width.py",),
        "A node at the end of the graph names its leaf.",
    ),
    Upstream(
        "torch.random.fork_rng", "2.13", (ON_POLICY, LATENCY, "distillation/capture/output_layer.py"),
        "Random numbers of a probe leave the run's own untouched.",
        Check.TAKES, ("devices", "device_type"),
    ),
    Upstream(
        "torch.default_generator", "2.13", (ON_POLICY,),
        "Seeds the CPU alone: `torch.manual_seed` would seed devices that are not put back.",
    ),
    # sharding
    Upstream(
        "torch.distributed.fsdp.FSDPModule.reshard", "2.13", (SHARDING,),
        "Gives back what was gathered for the output layer.",
    ),
    Upstream(
        "torch.distributed.fsdp.fully_shard", "2.13", (SHARDING,),
        "Shards a teacher over the processes of a run.",
        Check.TAKES, ("mesh", "reshard_after_forward"),
    ),
    Upstream(
        "torch.distributed.tensor.DTensor.device_mesh", "2.13", (SHARDING,),
        "The teacher is sharded over the same processes as the student.",
    ),
)  # fmt: skip
