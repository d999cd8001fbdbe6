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
    Upstream(
        "torch._C._current_graph_task_id", "2.13", (MODULES,),
        "Is -1 outside of a backward pass. A forward pass within one is gradient checkpointing: it repeats an earlier "
        "one, whose inputs were counted.",
    ),
    # nn.Module
    Upstream(
        f"{MODULE}._parameters", "2.13",
        (
            MASKED_NORMS, "quantization/storage.py", "quantization/layers/packed.py", "vocabulary/rows.py",
            "export/codes.py",
        ),
        "Replaces weights by packed codes with three dimensions, or by narrower weights, without a check of shapes. "
        "A property of the same name can hide a parameter.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._buffers", "2.13", (MASKED_NORMS, "vocabulary/rows.py"),
        "Replaces running statistics and biases by smaller ones.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._modules", "2.13", (TRAINING,),
        "Removes the quantizers of a fake-quantized module, to make it plain again.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}.__getattr__", "2.13", (TRAINING,),
        "It is called only for names that are not in `__dict__`, so a tensor there is read instead of the parameter.",
    ),
    Upstream(
        f"{MODULE}._forward_hooks", "2.13",
        (MODULES, "distillation/losses/fused.py", LATENCY, PROBE),
        "Hooks of a prepared model are found and removed; temporary copies have no hooks.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._forward_pre_hooks", "2.13",
        (MODULES, "distillation/losses/fused.py", "integration/kv_cache.py", LATENCY, PROBE),
        "The same for hooks that run before forward.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._forward_hooks_with_kwargs", "2.13", (MODULES,),
        "Stores which hooks take keyword arguments; the entries of removed hooks are deleted.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._forward_hooks_always_called", "2.13", (MODULES,),
        "The same for hooks that also run after an error.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}.register_forward_hook", "2.13", ("distillation/callback.py", MASKED_NORMS),
        "A hook that also runs after an error restores full tensors and closes open contexts.",
        Check.TAKES, ("with_kwargs", "always_call"),
    ),
    Upstream(
        "torch.nn.LayerNorm.normalized_shape", "2.13", (MASKED_NORMS, "pruning/matrices.py"),
        "Becomes smaller with the channels of a norm.",
        Check.SETS,
    ),
    Upstream(
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear", "2.13", ("quantization/layers/families.py",),
        "nn.MultiheadAttention reads the weight of its output projection without calling it, so the layer remains in "
        "floating point.",
    ),
    # kernels
    Upstream(
        "torch.ops.aten._int_mm", "2.13", (CPU,),
        "Products of int8 codes: the fast path of w8a8.",
        Check.TAKES, ("self", "mat2"),
    ),
    Upstream(
        "torch.ops.aten._convert_weight_to_int4pack_for_cpu", "2.13", (CPU,),
        "Arranges four-bit codes for the kernel of w4a16.",
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
        "Intercepts torch operators, to count matrix products outside known layers.",
    ),
    Upstream(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "2.13", ("core/counting.py",),
        "Fused attention is recognised by the prefix of its name, and counted from the shapes of its first three "
        "arguments.",
        Check.TAKES, ("query", "key", "value"),
    ),
    Upstream(
        "torch.backends.cpu.get_cpu_capability", "2.13", (CPU,),
        "\"AVX512\" means that integer products are fast.",
    ),
    # autograd and random numbers
    Upstream(
        "torch.autograd.graph.Node.next_functions", "2.13", ("pruning/structure/hidden_width.py",),
        "The graph is traversed to find the tensors from which a tensor was computed.",
    ),
    Upstream(
        "torch._C._functions.AccumulateGrad.variable", "2.13", ("pruning/structure/hidden_width.py",),
        "Gives the leaf tensor of a node at the end of the graph.",
    ),
    Upstream(
        "torch.random.fork_rng", "2.13", (ON_POLICY, LATENCY, "distillation/capture/output_layer.py"),
        "Keeps the random state of a run unchanged by random numbers that hf_slim draws.",
        Check.TAKES, ("devices", "device_type"),
    ),
    Upstream(
        "torch.default_generator", "2.13", (ON_POLICY,),
        "Seeds only the CPU: `torch.manual_seed` would also seed devices whose state is not restored.",
    ),
    # sharding
    Upstream(
        "torch.distributed.fsdp.FSDPModule.reshard", "2.13", (SHARDING,),
        "Frees the weights that were gathered for the output layer.",
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
