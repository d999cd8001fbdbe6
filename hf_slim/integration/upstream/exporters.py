"""The exporters of transformers, the caches that they trace, and the operators that ONNX Runtime brings."""

from hf_slim.integration.upstream.row import Check, Upstream

TORCH_EXPORT = "export/graphs/torch_export.py"
ONNX = "export/graphs/onnx.py"
OPENVINO = "export/graphs/openvino.py"
INTERFACE = "export/graphs/interface.py"
TRACING = "export/graphs/tracing.py"
LAYERS = "export/graphs/onnx_layers.py"

MODULE = "torch.nn.modules.module.Module"
COPYING, STAND_INS = "export/graphs/copying.py", "export/graphs/stand_ins.py"

EXPORTERS = (
    # modules of a copy
    Upstream(
        f"{MODULE}._parameters", "2.13", (COPYING, STAND_INS, TORCH_EXPORT),
        "The copy of a model has its own, with the tensors of the model or cast ones.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._buffers", "2.13", (COPYING, STAND_INS, TORCH_EXPORT, LAYERS),
        "The same for buffers.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._modules", "2.13", (COPYING,),
        "Layers are replaced in the copy.",
        Check.SETS,
    ),
    Upstream(
        f"{MODULE}._forward_pre_hooks", "2.13", (INTERFACE, "export/graphs/rounding.py"),
        "A hook that rounds the cache tells that a graph cannot have it; one is added to a copy, not to the model.",
        Check.SETS,
    ),
    # transformers
    Upstream(
        "transformers.exporters.DynamoExporter", "5.23", (TORCH_EXPORT,),
        "Traces a model with its cache by torch.export.",
    ),
    Upstream(
        "transformers.exporters.DynamoConfig", "5.23", (TORCH_EXPORT,),
        "Its settings: sizes are dynamic.",
        Check.TAKES, ("dynamic",),
    ),
    Upstream(
        "transformers.exporters.OnnxExporter", "5.23", (ONNX,),
        "Traces a model to ONNX.",
    ),
    Upstream(
        "transformers.exporters.OnnxConfig", "5.23", (ONNX,),
        "Its settings: sizes are dynamic.",
        Check.TAKES, ("dynamic",),
    ),
    Upstream(
        "transformers.exporters.OpenVINOExporter", "5.23", (OPENVINO,),
        "Traces a model to OpenVINO.",
    ),
    Upstream(
        "transformers.exporters.OpenVINOConfig", "5.23", (OPENVINO,),
        "Its settings: sizes are dynamic, and a decoder keeps its cache itself.",
        Check.TAKES, ("dynamic", "stateful"),
    ),
    Upstream(
        "transformers.exporters.ExportedModel.from_pretrained", "5.23", (TORCH_EXPORT, ONNX, OPENVINO),
        "Loads an exported graph on its runtime, to be compared with the model.",
    ),
    Upstream(
        "transformers.exporters.ExportedModel.save_pretrained", "5.23", (TRACING,),
        "Writes a graph with what describes its inputs and outputs.",
    ),
    Upstream(
        "transformers.exporters.ExportedModel.components", "5.23", (TORCH_EXPORT, ONNX, OPENVINO),
        "The graph, and the names of the inputs that it was traced with.",
        Check.SETS,
    ),
    Upstream(
        "transformers.exporters.ExportedModel.runners", "5.23", (OPENVINO,),
        "Holds the compiled graph of OpenVINO.",
    ),
    Upstream(
        "transformers.exporters.ExportedModel", "5.23", (TRACING,),
        "What an exporter returns.",
    ),
    Upstream(
        "transformers.utils.logging.get_verbosity", "5.23", (TRACING,),
        "The exporters warn about versions and open sizes in every run; they are quiet for as long as they trace.",
    ),
    Upstream(
        "transformers.exporters.utils.get_leaf_tensors", "5.23", (TRACING,),
        "The tensors of a cache, in the order in which a graph takes them.",
        Check.TAKES, ("obj",),
    ),
    Upstream(
        "transformers.cache_utils.DynamicLayer", "5.23", (INTERFACE,),
        "Keys and values of one layer, which a graph takes and returns.",
    ),
    Upstream(
        "transformers.cache_utils.DynamicSlidingWindowLayer", "5.23", (INTERFACE,),
        "The same for attention to the last tokens only.",
    ),
    Upstream(
        "transformers.cache_utils.DynamicLayer.crop", "5.23", (INTERFACE,),
        "Takes the last tokens away, which leaves an empty cache whose tensors are there.",
        Check.SAYS, ("tokens_to_remove", "self.keys[..., : -abs(tokens_to_remove), :]"),
    ),
    Upstream(
        "torch.onnx.ops.symbolic", "2.13", (LAYERS,),
        "Puts an operator of ONNX Runtime into a graph.",
        Check.TAKES, ("domain_op", "inputs", "attrs", "dtype", "shape", "version"),
    ),
    Upstream(
        "torch.export.ExportedProgram.example_inputs", "2.13", (TORCH_EXPORT,),
        "Would be pickled into the file; without them the file holds no pickle.",
    ),
    Upstream(
        "torch.export.ExportedProgram.range_constraints", "2.13", (TORCH_EXPORT,),
        "The least sizes of inputs; those above 2 are lowered, or short prompts would be refused.",
    ),
)  # fmt: skip
