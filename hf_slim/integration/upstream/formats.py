"""How transformers reads folders of other libraries, and what the formats of hf_slim rely on."""

from hf_slim.integration.upstream.row import Check, Upstream

ROOM = "integration/formats"
FORMAT, CHOICE, FILES = f"{ROOM}/format.py", f"{ROOM}/choice.py", f"{ROOM}/files.py"
READERS = (f"{ROOM}/compressed_tensors.py", f"{ROOM}/gemma.py", f"{ROOM}/bitsandbytes.py")
QUANTIZER, REBUILD = "integration/hf_quantizer.py", "integration/rebuild.py"
REMOTE_CODE = f"{ROOM}/remote_code.py"

SAVE_FORMATS = (
    Upstream(
        "transformers.quantizers.auto.AutoQuantizationConfig.from_dict", "5.23", (QUANTIZER,),
        "Asks the class in its table to read config.json; ours recognises the folders of hf_slim by their mark.",
        Check.SAYS, ("AUTO_QUANTIZATION_CONFIG_MAPPING", "from_dict"),
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.get_state_dict_and_metadata", "5.23", (QUANTIZER,),
        "Gives `save_pretrained` the tensors as the format of the folder has them.",
        Check.TAKES, ("model",),
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.get_new_dtype", "5.23", (QUANTIZER,),
        "Says what a tensor of a file is cast to; codes that look like 8-bit floats are not cast.",
        Check.TAKES, ("converter", "param", "dtype"),
    ),
    Upstream(
        "transformers.core_model_loading.ConversionOps.convert", "5.23", (FORMAT,),
        "Turns tensors of a file into those of packed layers.",
        Check.TAKES, ("input_dict",),
    ),
    Upstream(
        "transformers.core_model_loading.WeightConverter.convert", "5.23", (FORMAT,),
        "Hands a conversion the name of the layer and the model.",
        Check.SAYS, ("full_layer_name", "model"),
    ),
    Upstream(
        "transformers.core_model_loading.WeightConverter", "5.23", (FORMAT, CHOICE, FILES, *READERS),
        "Renames and converts the tensors of a file; models whose own conversions change values are refused.",
        Check.TAKES, ("source_patterns", "target_patterns", "operations"),
    ),
    Upstream(
        "transformers.core_model_loading.convert_and_load_state_dict_in_model", "5.23", (REBUILD,),
        "Keeps the conversions that it has used for saving; the packed form has no use for them.",
        Check.SAYS, ("_weight_conversions",),
    ),
    Upstream(
        "transformers.conversion_mapping.get_model_conversion_mapping", "5.23", (CHOICE,),
        "Says whether files of a kind of model are laid out otherwise than the model.",
        Check.TAKES, ("model", "add_legacy"),
    ),
    Upstream(
        "transformers.quantizers.quantizers_utils.should_convert_module", "5.23", (f"{ROOM}/gemma.py",),
        "Decides which layers transformers converts; names that it would mistake are refused.",
        Check.TAKES, ("full_name", "patterns"),
    ),
    Upstream(
        "transformers.PreTrainedModel._keep_in_fp32_modules", "5.23", (f"{ROOM}/gemma.py",),
        "Layers that transformers keeps in float32, whatever config.json says.",
    ),
    Upstream(
        "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected", "5.23", (FILES,),
        "Tensors of a file that packed layers have no use for are not reported.",
    ),
    Upstream(
        "transformers.PreTrainedModel.get_expanded_tied_weights_keys", "5.23", (FILES,),
        "Says what is tied once the config says again that weights are.",
        Check.TAKES, ("all_submodels",),
    ),
    Upstream(
        "transformers.PreTrainedModel._initialize_weights", "5.23", (REBUILD,),
        "Initialises what was not loaded, and takes layers on disk for such; packed ones are marked.",
        Check.SAYS, ("_is_hf_initialized",),
    ),
    Upstream(
        "transformers.PreTrainedModel._init_weights", "5.23", (f"{ROOM}/compressed_tensors.py",),
        "Is tried without weights: a model whose own one reads them cannot be loaded from packed words.",
        Check.TAKES, ("module",),
    ),
    Upstream(
        "transformers.PreTrainedConfig.per_layer_config", "5.23", (f"{ROOM}/per_layer.py",),
        "Sizes that differ from layer to layer, for a static cache and other readers of the config.",
    ),
    Upstream(
        "transformers.PreTrainedConfig.allow_global_per_layer_attribute_access", "5.23", (f"{ROOM}/per_layer.py",),
        "Lets models that read one size for all layers still be built.",
    ),
    Upstream(
        "transformers.AutoModelForCausalLM._model_mapping", "5.23", (REMOTE_CODE,),
        "Tells which Auto classes load a model, so that config.json points all of them to our two lines.",
    ),
    Upstream(
        "transformers.models.auto.auto_factory._BaseAutoModelClass.from_pretrained", "5.23", (REMOTE_CODE,),
        "Calls these two of the class that a folder brings along.",
        Check.SAYS, ("register_for_auto_class", "from_pretrained"),
    ),
    Upstream(
        "transformers.integrations.gemma_quant.QuantizedEmbedding", "5.23", (f"{ROOM}/gemma.py",),
        "The layout of packed embeddings in transformers.",
        Check.SAYS, ("embedding_quantized", "embedding_scale"),
    ),
    Upstream(
        "transformers.integrations.gemma_quant.QuantizedLinear", "5.23", (f"{ROOM}/gemma.py",),
        "The layout of packed linear layers in transformers.",
        Check.SAYS, ("input_activation_scale", "output_activation_scale"),
    ),
    Upstream(
        "bitsandbytes.functional.QuantState.as_dict", "0.50", (f"{ROOM}/bitsandbytes.py",),
        "The layout of the state of a 4-bit weight.",
        Check.SAYS, ("quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape", "quant_state.bitsandbytes__"),
    ),
)  # fmt: skip
