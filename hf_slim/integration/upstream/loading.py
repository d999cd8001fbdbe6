"""How transformers loads and saves models: quantizers, conversions of weights, Auto classes."""

from hf_slim.integration.upstream.row import Check, Upstream

QUANTIZER = "integration/hf_quantizer.py"
REBUILD = "integration/rebuild.py"
CONFIG_JSON = "integration/config_json.py"
TENSORS = "integration/trust/tensors.py"
SOURCE = "integration/trust/source.py"

LOADING = (
    # the quantizer that is registered as "hf_slim"
    Upstream(
        "transformers.quantizers.register_quantization_config", "5.23", (QUANTIZER,),
        "Makes transformers read `quantization_config` with the method \"hf_slim\".",
        Check.TAKES, ("method",),
    ),
    Upstream(
        "transformers.quantizers.register_quantizer", "5.23", (QUANTIZER,),
        "Makes `from_pretrained` call the quantizer of hf_slim.",
        Check.TAKES, ("name",),
    ),
    Upstream(
        "transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING", "5.23", (QUANTIZER,),
        "Read to check whether \"hf_slim\" is already registered: a second registration raises an error.",
    ),
    Upstream(
        "transformers.utils.quantization_config.QuantizationConfigMixin", "5.23", (QUANTIZER,),
        "Base class of the section of config.json that describes a compressed model.",
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.update_attn_implementation", "5.23", (QUANTIZER,),
        "The first call that brings the config, before a model is built from it or a file is opened: it is checked "
        "here. Without it a damaged folder is refused later.",
        Check.TAKES, ("config",),
    ),
    Upstream(
        "transformers.PreTrainedModel.from_pretrained", "5.23", (QUANTIZER,),
        "Sets `config.name_or_path` and hands over the files of the checkpoint before a model is filled: they are "
        "checked. Without them nothing about the files is.",
        Check.SAYS, ("config.name_or_path = pretrained_model_name_or_path", "checkpoint_files=checkpoint_files"),
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer._process_model_before_weight_loading", "5.23", (QUANTIZER,),
        "Resizes and replaces modules in this method, so that the checkpoint fits the model.",
        Check.TAKES, ("model",),
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer._process_model_after_weight_loading", "5.23", (QUANTIZER,),
        "Marks packed layers as filled in this method, and unmarks a model in training form as quantized.",
        Check.TAKES, ("model",),
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.update_weight_conversions", "5.23", (QUANTIZER,),
        "Removes conversions that split or merge weights, because packed codes cannot be split.",
        Check.TAKES, ("weight_conversions", "model"),
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.is_serializable", "5.23", (QUANTIZER,),
        "`save_pretrained` raises an error if it returns False.",
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.is_trainable", "5.23", (QUANTIZER,),
        "Returns True, so that adapters on a packed model can be trained.",
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.is_compileable", "5.23", (QUANTIZER,),
        "`generate` compiles a model only if this is True.",
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.preprocess_model", "5.23", (CONFIG_JSON,),
        "A converted model gets the same attributes as a loaded one.",
        Check.SAYS, ('"is_quantized"', '"quantization_method"'),
    ),
    Upstream(
        "transformers.quantizers.base._assign_is_quantized", "5.23", (REBUILD,),
        "transformers sets `_is_quantized` on configs. It is removed from a model in training form, because the "
        "Trainer refuses models that have it.",
        Check.SAYS, ("_is_quantized = True",),
    ),
    Upstream(
        "transformers.PreTrainedModel.save_pretrained", "5.23", (QUANTIZER, CONFIG_JSON),
        "Uses `hf_quantizer` to write config.json. A converted model gets a quantizer; a loaded model in training "
        "form has its quantizer removed.",
        Check.SAYS, ('"hf_quantizer"',),
    ),
    Upstream(
        "transformers.PreTrainedModel.all_tied_weights_keys", "5.23", (REBUILD, TENSORS),
        "Names the head that will be tied to the embedding, so that both can share their scales.",
        Check.SETS,
    ),
    # conversions between checkpoint and model
    Upstream(
        "transformers.core_model_loading.WeightConverter", "5.23", (REBUILD, TENSORS),
        "Conversions of this class change values; other conversions only change names.",
    ),
    Upstream(
        "transformers.core_model_loading.WeightRenaming", "5.23", (TENSORS,),
        "Conversions of this class change names alone.",
    ),
    Upstream(
        "transformers.core_model_loading.rename_source_key", "5.23", (TENSORS,),
        "Gives the name in the model for a name in the file, so that missing tensors are noticed before memory is "
        "given to them.",
        Check.TAKES, ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"),
    ),
    Upstream(
        "transformers.PreTrainedModel._keys_to_ignore_on_load_missing", "5.23", (TENSORS,),
        "Weights that a checkpoint may lack.",
    ),
    Upstream(
        "transformers.conversion_mapping.get_model_conversion_mapping", "5.23", (CONFIG_JSON,),
        "Returns the conversions of a model that was built and not loaded.",
        Check.TAKES, ("model", "add_legacy"),
    ),
    Upstream(
        "transformers.core_model_loading.revert_weight_conversion", "5.23", (CONFIG_JSON,),
        "`save_pretrained` reverts the conversions in `_weight_conversions`; a packed model may only have renamings.",
        Check.SAYS, ('"_weight_conversions"',),
    ),
    # Auto classes and from_pretrained
    Upstream(
        "transformers.AutoModelForCausalLM._model_mapping", "5.23",
        ("integration/loading.py", "distillation/teachers/loading.py"),
        "Lists the classes that an Auto class loads. It is used to detect a checkpoint without a head, and to load a "
        "teacher with the same kind of head as the student.",
    ),
    Upstream(
        "transformers.PreTrainedModel.from_pretrained", "5.23", ("integration/loading.py",),
        "Used to raise an error for missing weights, which transformers fills with random values.",
        Check.SAYS, ('"output_loading_info"',),
    ),
    Upstream(
        "transformers.utils.hub.cached_file", "5.23", (SOURCE,),
        "Fetches config and weights of a Hub id, so that they are checked before they are loaded; a missing file "
        "gives None.",
        Check.TAKES, ("path_or_repo_id", "filename"),
    ),
    Upstream(
        "transformers.utils.hub.cached_files", "5.23", (SOURCE,),
        "A missing file gives None where this is asked for.",
        Check.TAKES, ("_raise_exceptions_for_missing_entries",),
    ),
    Upstream(
        "transformers.utils.loading_report.LoadStateDictInfo.missing_keys", "5.23", ("integration/loading.py",),
        "Names the weights that are missing in the checkpoint.",
        Check.SETS,
    ),
    Upstream(
        "transformers.GgufConfig", "5.23", ("integration/loading.py",),
        "Loads a .gguf file as a model with ordinary float weights.",
        Check.TAKES, ("dequantize", "gguf_file"),
    ),
    Upstream(
        "transformers.PreTrainedModel.base_model_prefix", "5.23",
        ("core/modules.py", "integration/loading.py", TENSORS),
        "The paths of layers in models with and without a head differ by this prefix.",
    ),
    Upstream(
        "transformers.PreTrainedModel._no_split_modules", "5.23", ("distillation/teachers/sharding.py",),
        "Names the layers that are the units of sharding: a teacher is sharded as accelerate shards a student.",
    ),
    # the key-value cache
    Upstream(
        "transformers.cache_utils.DynamicLayer.lazy_initialization", "5.23", ("integration/kv_cache.py",),
        "Called by a quantized cache layer, which is initialised like an ordinary one and then stores codes.",
        Check.TAKES, ("key_states", "value_states"),
    ),
    Upstream(
        "transformers.cache_utils.DynamicLayer.update", "5.23", ("integration/kv_cache.py",),
        "Attention passes its keys and values to this method, and uses the keys and values that it returns.",
        Check.TAKES, ("key_states", "value_states"),
    ),
    Upstream(
        "transformers.cache_utils.DynamicLayer.is_initialized", "5.23", ("integration/kv_cache.py",),
        "Distinguishes an empty layer, which may be replaced, from a filled one.",
        Check.SETS,
    ),
    Upstream(
        "transformers.cache_utils.Cache", "5.23", ("integration/kv_cache.py",),
        "A cache is built from quantized layers.",
        Check.TAKES, ("layers",),
    ),
    Upstream(
        "transformers.cache_utils.Cache.layers", "5.23", ("integration/kv_cache.py",),
        "The layers of the empty cache that `generate` creates are replaced.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.LlamaModel.forward", "5.23", ("integration/kv_cache.py",),
        "Takes the cache; the argument is `cache` since transformers 5.24. Without these names, `kv_cache` raises an "
        "error for every model.",
        Check.TAKES_ONE, ("cache", "past_key_values"),
    ),
    Upstream(
        "transformers.PreTrainedModel.is_gradient_checkpointing", "5.23", ("integration/kv_cache.py",),
        "Gradient checkpointing disables the cache, so using both raises an error.",
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.LlamaAttention.is_causal", "5.23",
        ("integration/kv_cache.py", "distillation/capture/attention_states.py"),
        "Distinguishes a decoder, which has a cache, from an encoder, and causal from full sdpa attention without "
        "mask.",
        Check.SETS,
    ),
    Upstream(
        "transformers.Qwen3Config", "5.23", ("integration/kv_cache.py", "pruning/removal/layers.py"),
        "Distinguishes layers with full attention from other layers.",
        Check.HAS, ("layer_types",),
    ),
)  # fmt: skip
