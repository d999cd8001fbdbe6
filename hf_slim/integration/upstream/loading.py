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
        "Makes `from_pretrained` call our quantizer.",
        Check.TAKES, ("name",),
    ),
    Upstream(
        "transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING", "5.23", (QUANTIZER,),
        "Tells whether \"hf_slim\" is registered already: a second registration raises.",
    ),
    Upstream(
        "transformers.utils.quantization_config.QuantizationConfigMixin", "5.23", (QUANTIZER,),
        "The base of what config.json holds about a compressed model.",
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
        "Here modules are resized and swapped, so that the checkpoint fits.",
        Check.TAKES, ("model",),
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer._process_model_after_weight_loading", "5.23", (QUANTIZER,),
        "Here packed layers learn that they hold values, and a trainable model stops to be a quantized one.",
        Check.TAKES, ("model",),
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.update_weight_conversions", "5.23", (QUANTIZER,),
        "Conversions that split or merge weights are dropped: codes cannot be split.",
        Check.TAKES, ("weight_conversions", "model"),
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.is_serializable", "5.23", (QUANTIZER,),
        "`save_pretrained` refuses a model whose quantizer says no.",
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.is_trainable", "5.23", (QUANTIZER,),
        "Says that adapters on a packed model can be trained.",
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.is_compileable", "5.23", (QUANTIZER,),
        "`generate` compiles a model only if its quantizer allows it.",
    ),
    Upstream(
        "transformers.quantizers.HfQuantizer.preprocess_model", "5.23", (CONFIG_JSON,),
        "A converted model is given the mark that a loaded one has.",
        Check.SAYS, ('"is_quantized"', '"quantization_method"'),
    ),
    Upstream(
        "transformers.quantizers.base._assign_is_quantized", "5.23", (REBUILD,),
        "transformers marks configs with `_is_quantized`; the mark is taken off a model in training form, or the "
        "Trainer refuses it.",
        Check.SAYS, ("_is_quantized = True",),
    ),
    Upstream(
        "transformers.PreTrainedModel.save_pretrained", "5.23", (QUANTIZER, CONFIG_JSON),
        "Asks `hf_quantizer` what to write. A converted model gets one, a loaded model in training form loses it.",
        Check.SAYS, ('"hf_quantizer"',),
    ),
    Upstream(
        "transformers.PreTrainedModel.all_tied_weights_keys", "5.23", (REBUILD, TENSORS),
        "Says which head is tied to which embedding before weights are tied: they share their scales too.",
        Check.SETS,
    ),
    # conversions between checkpoint and model
    Upstream(
        "transformers.core_model_loading.WeightConverter", "5.23", (REBUILD, TENSORS),
        "Conversions of this class change values, and not just names.",
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
        "Gives the conversions of a model that was built and not loaded.",
        Check.TAKES, ("model", "add_legacy"),
    ),
    Upstream(
        "transformers.core_model_loading.revert_weight_conversion", "5.23", (CONFIG_JSON,),
        "`save_pretrained` reverts what `_weight_conversions` holds; a packed model must hold renamings alone.",
        Check.SAYS, ('"_weight_conversions"',),
    ),
    # Auto classes and from_pretrained
    Upstream(
        "transformers.AutoModelForCausalLM._model_mapping", "5.23",
        ("integration/loading.py", "distillation/teachers/loading.py"),
        "Tells which classes an Auto class loads, so that a checkpoint without a head is noticed and a teacher gets "
        "the student's head.",
    ),
    Upstream(
        "transformers.PreTrainedModel.from_pretrained", "5.23", ("integration/loading.py",),
        "Missing weights are refused; transformers would fill them with random values.",
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
        "Names the weights that the checkpoint lacks.",
        Check.SETS,
    ),
    Upstream(
        "transformers.GgufConfig", "5.23", ("integration/loading.py",),
        "Loads a .gguf file as ordinary floats.",
        Check.TAKES, ("dequantize", "gguf_file"),
    ),
    Upstream(
        "transformers.PreTrainedModel.base_model_prefix", "5.23",
        ("core/modules.py", "integration/loading.py", TENSORS),
        "Layers are found in models with and without a head, whose paths differ by it.",
    ),
    Upstream(
        "transformers.PreTrainedModel._no_split_modules", "5.23", ("distillation/teachers/sharding.py",),
        "Names the layers by which a teacher is sharded, as accelerate shards a student.",
    ),
    # the key-value cache
    Upstream(
        "transformers.cache_utils.DynamicLayer.lazy_initialization", "5.23", ("integration/kv_cache.py",),
        "A quantized layer of the cache starts as an ordinary one and then holds codes.",
        Check.TAKES, ("key_states", "value_states"),
    ),
    Upstream(
        "transformers.cache_utils.DynamicLayer.update", "5.23", ("integration/kv_cache.py",),
        "Attention hands its keys and values to it and computes with what it returns.",
        Check.TAKES, ("key_states", "value_states"),
    ),
    Upstream(
        "transformers.cache_utils.DynamicLayer.is_initialized", "5.23", ("integration/kv_cache.py",),
        "Tells a fresh layer, which may be replaced, from a filled one.",
        Check.SETS,
    ),
    Upstream(
        "transformers.cache_utils.Cache", "5.23", ("integration/kv_cache.py",),
        "A cache is built of our layers.",
        Check.TAKES, ("layers",),
    ),
    Upstream(
        "transformers.cache_utils.Cache.layers", "5.23", ("integration/kv_cache.py",),
        "The layers of the fresh cache that `generate` makes are replaced.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.LlamaModel.forward", "5.23", ("integration/kv_cache.py",),
        "Takes the cache, as `cache` since transformers 5.24. Without either name `kv_cache` is refused everywhere.",
        Check.TAKES_ONE, ("cache", "past_key_values"),
    ),
    Upstream(
        "transformers.PreTrainedModel.is_gradient_checkpointing", "5.23", ("integration/kv_cache.py",),
        "Gradient checkpointing takes the cache away, so both together are refused.",
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.LlamaAttention.is_causal", "5.23",
        ("integration/kv_cache.py", "distillation/capture/attention_states.py"),
        "Tells a decoder, which keeps a cache, from an encoder; and whether sdpa without a mask is causal.",
        Check.SETS,
    ),
    Upstream(
        "transformers.Qwen3Config", "5.23", ("integration/kv_cache.py", "pruning/removal/layers.py"),
        "Tells layers with full attention from others.",
        Check.HAS, ("layer_types",),
    ),
)  # fmt: skip
