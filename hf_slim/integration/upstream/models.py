"""What models, configs, outputs and tokenizers of transformers are asked for by the names of their parts."""

from hf_slim.integration.upstream.row import Check, Upstream

ATTENTION = "distillation/capture/attention_states.py"
OUTPUT_LAYER = "distillation/capture/output_layer.py"
ON_POLICY = "distillation/on_policy.py"
SIZES = "pruning/structure/sizes.py"
EXPERTS = "pruning/structure/experts.py"
EXAMPLE_INPUTS = "pruning/structure/example_inputs.py"

MODELS = (
    # attention
    Upstream(
        "transformers.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS", "5.23", (ATTENTION,),
        "Files of models take their attention function from a table of this name. Under another name the attention of "
        "no family can be recorded.",
    ),
    Upstream(
        "transformers.modeling_utils.AttentionInterface.get_interface", "5.23", (ATTENTION,),
        "Replaced for the time of a forward pass by a function that records queries, keys and values.",
        Check.TAKES, ("attn_implementation", "default"),
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.eager_attention_forward", "5.23", (ATTENTION,),
        "Called again to compute the attention map; the recorded arguments are those of the call.",
        Check.TAKES, ("module", "query", "key", "value", "attention_mask", "dropout"),
    ),
    Upstream(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward", "5.23", (ATTENTION,),
        "Its mask is boolean, or None where `is_causal` says all: an eager function is given the same as numbers.",
        Check.TAKES, ("module", "query", "key", "value", "attention_mask", "is_causal"),
    ),
    Upstream(
        "transformers.PreTrainedModel.get_encoder", "5.23", (ATTENTION,),
        "Of an encoder-decoder the encoder's attention is recorded.",
    ),
    # losses and outputs
    Upstream(
        "transformers.loss.loss_utils.ForCausalLMLoss", "5.23", (OUTPUT_LAYER,),
        "A model with this loss predicts the next token. Under another name labels are not shifted, silently.",
        Check.TAKES, ("logits", "labels", "num_items_in_batch"),
    ),
    Upstream(
        "transformers.PreTrainedModel.loss_function", "5.23", (OUTPUT_LAYER,),
        "Gives the loss function, whose name is read.",
    ),
    Upstream(
        "transformers.PreTrainedModel.loss_type", "5.23", ("distillation/distiller.py",),
        "A sequence classifier with one label computes a regression.",
        Check.SETS,
    ),
    Upstream(
        "transformers.loss.loss_utils.ForSequenceClassificationLoss", "5.23", ("distillation/distiller.py",),
        "`problem_type` of the config, or one label, decides which loss a classifier computes.",
        Check.SAYS, ("config.problem_type", "num_labels == 1", '"regression"'),
    ),
    Upstream(
        "transformers.models.mixtral.modeling_mixtral.MixtralForCausalLM.forward", "5.23", (OUTPUT_LAYER,),
        "A model that adds `aux_loss` to its loss computes it itself.",
        Check.SAYS, ("aux_loss = load_balancing_loss_func", "aux_loss=aux_loss"),
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.LlamaForCausalLM.forward", "5.23",
        ("evaluation/latency.py", "evaluation/tasks/causal_lm.py"),
        "Makes logits for the last position alone.",
        Check.TAKES, ("logits_to_keep",),
    ),
    Upstream(
        "transformers.PreTrainedModel.get_output_embeddings", "5.23", (OUTPUT_LAYER, "vocabulary/rows.py"),
        "Gives the layer that makes the logits.",
    ),
    Upstream(
        "transformers.PreTrainedModel.get_input_embeddings", "5.23", (ON_POLICY, "vocabulary/rows.py"),
        "Gives the table of the vocabulary.",
    ),
    Upstream(
        "transformers.PreTrainedModel.base_model", "5.23", (OUTPUT_LAYER, "integration/kv_cache.py"),
        "The backbone: it takes the cache, and its output is what enters the output layer.",
    ),
    Upstream(
        "transformers.T5ForConditionalGeneration.prepare_decoder_input_ids_from_labels", "5.23",
        ("distillation/targets.py",),
        "Makes of the labels what a decoder reads, so that the teacher need not see labels.",
        Check.TAKES, ("labels",),
    ),
    # generation
    Upstream(
        "transformers.generation.utils.GenerationMixin._prepare_generation_config", "5.23", (ON_POLICY,),
        "`generate` fills gaps from the `generation_config` of the model, which is replaced for the time: otherwise "
        "top-p and penalties of the model change what the student writes.",
        Check.SAYS, ("self.generation_config",),
    ),
    Upstream(
        "transformers.GenerationConfig", "5.23", ("vocabulary/rows.py",),
        "Token ids that it holds are renumbered, or refused where they cannot be followed.",
        Check.HAS,
        (
            "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias",
        ),
    ),
    # what a model says about its inputs
    Upstream(
        "transformers.PreTrainedModel.main_input_name", "5.23", (EXAMPLE_INPUTS, OUTPUT_LAYER),
        "Tells texts from pictures and sounds.",
    ),
    Upstream(
        "transformers.PreTrainedModel.dummy_inputs", "5.23", ("distillation/followed_layers.py",),
        "A made-up input of a model that reads no text.",
    ),
    Upstream(
        "transformers.ViTConfig", "5.23", (EXAMPLE_INPUTS,),
        "Says how large a picture is.",
        Check.HAS, ("image_size", "num_channels"),
    ),
    Upstream(
        "transformers.WhisperConfig", "5.23", (EXAMPLE_INPUTS,),
        "Says how large a spectrogram is.",
        Check.HAS, ("num_mel_bins", "max_source_positions"),
    ),
    Upstream(
        "transformers.PreTrainedConfig.get_text_config", "5.23",
        ("core/modules.py", EXAMPLE_INPUTS, "integration/kv_cache.py", "student/structure.py"),
        "The part of a config that is about text.",
    ),
    Upstream(
        "transformers.LlamaConfig", "5.23", (ON_POLICY, "distillation/teachers/live.py", "pruning/budget/latency.py"),
        "Says how long a text may be.",
        Check.HAS, ("max_position_embeddings",),
    ),
    # sizes that pruning writes back, by the names of attributes
    Upstream(
        "transformers.LlamaConfig", "5.23", (SIZES,),
        "Sizes in a config that shrink with heads, neurons and channels. A family with other words is refused, or its "
        "pruned models load only with hf_slim.",
        Check.HAS, ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size"),
    ),
    Upstream(
        "transformers.LlamaConfig", "5.23", ("pruning/budget/legal_sizes.py", "integration/config_json.py"),
        "With a size of heads of its own, fewer heads are not wider ones.",
        Check.HAS, ("head_dim",),
    ),
    Upstream(
        "transformers.LlamaConfig", "5.23", ("integration/kv_cache.py", "workflows/make_student.py"),
        "Length of the stack of layers.",
        Check.HAS, ("num_hidden_layers",),
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.LlamaAttention.num_key_value_groups", "5.23", (SIZES,),
        "Eager attention repeats heads that often, so it shrinks with the query heads.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.LlamaAttention.layer_idx", "5.23", ("pruning/removal/layers.py",),
        "The place of a layer in the cache; layers behind a removed one move up.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.gpt2.modeling_gpt2.GPT2Attention.split_size", "5.23", (SIZES,),
        "GPT-2 splits its fused projection by it, so it shrinks with the heads.",
        Check.SETS,
    ),
    Upstream(
        "transformers.GPT2Config", "5.23", (SIZES,),
        "None stands for four times the width, until neurons are removed.",
        Check.HAS, ("n_inner",),
    ),
    Upstream(
        "transformers.pytorch_utils.Conv1D.nf", "5.23",
        ("core/modules.py", "pruning/matrices.py"),
        "GPT-2's linear layer, known by its attributes, holds its weight transposed.",
        Check.SETS,
    ),
    Upstream(
        "transformers.pytorch_utils.Conv1D.nx", "5.23", ("core/counting.py", "pruning/matrices.py"),
        "Its number of inputs.",
        Check.SETS,
    ),
    # mixtures of experts
    Upstream(
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts.gate_up_proj", "5.23", (EXPERTS,),
        "Gate and up projection of all experts in one parameter. Under another name experts are not pruned.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts.down_proj", "5.23",
        (EXPERTS, "pruning/structure/depth.py", "pruning/matrices.py"),
        "The projection that reads them.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts.intermediate_dim", "5.23",
        ("pruning/matrices.py", SIZES),
        "The experts compute with this number of neurons.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts.num_experts", "5.23",
        (SIZES, "quantization/layers/families.py"),
        "Tells stacked matrices of experts from other tensors of three dimensions.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.mixtral.modeling_mixtral.MixtralTopKRouter.top_k", "5.23", (EXPERTS,),
        "So many experts must be kept.",
        Check.SETS,
    ),
    Upstream(
        "transformers.integrations.moe.use_experts_implementation", "5.23", ("quantization/layers/families.py",),
        "Experts with `is_transposed` hold their matrices the other way round and stay in floating point.",
        Check.TAKES, ("is_transposed",),
    ),
    Upstream(
        "transformers.MixtralConfig", "5.23", ("core/counting.py",),
        "The number of experts that a token visits.",
        Check.HAS, ("num_experts_per_tok",),
    ),
    Upstream(
        "transformers.MixtralConfig", "5.23", (SIZES,),
        "The number of experts, which shrinks with them.",
        Check.HAS, ("num_local_experts",),
    ),
    # rotary embeddings
    Upstream(
        "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.inv_freq", "5.23", ("export/gguf/metadata.py",),
        "The frequencies that a model rotates with, from which the scaling that a GGUF needs is found.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.attention_scaling", "5.23",
        ("export/gguf/metadata.py",),
        "Scalings that also scale attention are refused for GGUF.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding.forward", "5.23",
        ("export/gguf/metadata.py",),
        "Keeps one buffer of frequencies for every kind of layer, with the kind before its name.",
        Check.SAYS, ("inv_freq",),
    ),
    # tokenizers
    Upstream(
        "transformers.PreTrainedTokenizerFast.backend_tokenizer", "5.23",
        ("workflows/shrink_vocabulary.py", "export/gguf/tokenizer.py"),
        "Gives the content of tokenizer.json.",
    ),
    Upstream(
        "transformers.PreTrainedTokenizerBase.vocab_files_names", "5.23", ("workflows/shrink_vocabulary.py",),
        "Older forms of the vocabulary are deleted: they would contradict the smaller one.",
    ),
    Upstream(
        "transformers.PreTrainedTokenizerBase.special_tokens_map", "5.23", ("distillation/store/format.py",),
        "A store knows its tokenizer by vocabulary and special tokens.",
    ),
    Upstream(
        "transformers.PreTrainedTokenizerFast.is_fast", "5.23",
        ("distillation/teachers/retokenizer.py", "export/gguf/tokenizer.py"),
        "Only fast tokenizers know where tokens lie in a text, and have a tokenizer.json.",
    ),
)  # fmt: skip
