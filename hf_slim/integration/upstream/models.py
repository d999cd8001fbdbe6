"""Attributes of models, configs, outputs and tokenizers of transformers that hf_slim reads by name."""

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
        "Model files take their attention function from a table with this name. With another name, attention cannot "
        "be recorded for any family.",
    ),
    Upstream(
        "transformers.modeling_utils.AttentionInterface.get_interface", "5.23", (ATTENTION,),
        "Replaced during a forward pass by a function that records queries, keys and values.",
        Check.TAKES, ("attn_implementation", "default"),
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.eager_attention_forward", "5.23", (ATTENTION,),
        "Called again with the recorded arguments, to compute the attention map.",
        Check.TAKES, ("module", "query", "key", "value", "attention_mask", "dropout"),
    ),
    Upstream(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward", "5.23", (ATTENTION,),
        "Its mask is boolean, or None if `is_causal` is enough. An eager function gets the same mask as numbers.",
        Check.TAKES, ("module", "query", "key", "value", "attention_mask", "is_causal"),
    ),
    Upstream(
        "transformers.PreTrainedModel.get_encoder", "5.23", (ATTENTION,),
        "In an encoder-decoder model, the attention of the encoder is recorded.",
    ),
    # losses and outputs
    Upstream(
        "transformers.loss.loss_utils.ForCausalLMLoss", "5.23", (OUTPUT_LAYER,),
        "A model with this loss predicts the next token. With another name, labels are not shifted, without an error.",
        Check.TAKES, ("logits", "labels", "num_items_in_batch"),
    ),
    Upstream(
        "transformers.PreTrainedModel.loss_function", "5.23", (OUTPUT_LAYER,),
        "Returns the loss function, whose name is read.",
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
        "Computes logits only for the last positions.",
        Check.TAKES, ("logits_to_keep",),
    ),
    Upstream(
        "transformers.PreTrainedModel.get_output_embeddings", "5.23", (OUTPUT_LAYER, "vocabulary/rows.py"),
        "Returns the layer that computes the logits.",
    ),
    Upstream(
        "transformers.PreTrainedModel.get_input_embeddings", "5.23", (ON_POLICY, "vocabulary/rows.py"),
        "Returns the token embedding.",
    ),
    Upstream(
        "transformers.PreTrainedModel.base_model", "5.23", (OUTPUT_LAYER, "integration/kv_cache.py"),
        "The backbone: it takes the cache, and its output is what enters the output layer.",
    ),
    Upstream(
        "transformers.T5ForConditionalGeneration.prepare_decoder_input_ids_from_labels", "5.23",
        ("distillation/targets.py",),
        "Computes the decoder's inputs from the labels, so that the teacher does not need labels.",
        Check.TAKES, ("labels",),
    ),
    # generation
    Upstream(
        "transformers.generation.utils.GenerationMixin._prepare_generation_config", "5.23", (ON_POLICY,),
        "`generate` takes missing settings from the `generation_config` of the model. It is replaced during "
        "generation, because top-p and penalties of the model would change the student's text.",
        Check.SAYS, ("self.generation_config",),
    ),
    Upstream(
        "transformers.GenerationConfig", "5.23", ("vocabulary/rows.py",),
        "Token ids in these fields are renumbered, or raise an error if that is not supported.",
        Check.HAS,
        (
            "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias",
        ),
    ),
    # inputs of a model
    Upstream(
        "transformers.PreTrainedModel.main_input_name", "5.23", (EXAMPLE_INPUTS, OUTPUT_LAYER),
        "Distinguishes models of text, pictures and sounds.",
    ),
    Upstream(
        "transformers.PreTrainedModel.dummy_inputs", "5.23", ("distillation/followed_layers.py",),
        "A dummy input of a model that does not read text.",
    ),
    Upstream(
        "transformers.ViTConfig", "5.23", (EXAMPLE_INPUTS,),
        "Gives the size of a picture.",
        Check.HAS, ("image_size", "num_channels"),
    ),
    Upstream(
        "transformers.WhisperConfig", "5.23", (EXAMPLE_INPUTS,),
        "Gives the size of a spectrogram.",
        Check.HAS, ("num_mel_bins", "max_source_positions"),
    ),
    Upstream(
        "transformers.PreTrainedConfig.get_text_config", "5.23",
        ("core/host.py", EXAMPLE_INPUTS, "integration/kv_cache.py", "student/structure.py"),
        "Returns the text part of a config.",
    ),
    Upstream(
        "transformers.LlamaConfig", "5.23", (ON_POLICY, "distillation/teachers/live.py", "pruning/budget/latency.py"),
        "Gives the maximum length of a text.",
        Check.HAS, ("max_position_embeddings",),
    ),
    # sizes that pruning changes, by the names of attributes
    Upstream(
        "transformers.LlamaConfig", "5.23", (SIZES,),
        "Sizes in a config that become smaller with heads, neurons and channels. For a family with other names, "
        "pruning raises an error, or its pruned models load only with hf_slim.",
        Check.HAS, ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size"),
    ),
    Upstream(
        "transformers.LlamaConfig", "5.23", ("pruning/budget/legal_sizes.py", "integration/config_json.py"),
        "If a config has the width of a head, it does not change with the number of heads.",
        Check.HAS, ("head_dim",),
    ),
    Upstream(
        "transformers.LlamaConfig", "5.23", ("integration/kv_cache.py", "workflows/make_student.py"),
        "The number of layers.",
        Check.HAS, ("num_hidden_layers",),
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.LlamaAttention.num_key_value_groups", "5.23", (SIZES,),
        "Eager attention repeats key-value heads by this number, so it becomes smaller with the query heads.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.llama.modeling_llama.LlamaAttention.layer_idx", "5.23", ("pruning/removal/layers.py",),
        "The index of a layer in the cache; layers after a removed one get smaller indices.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.gpt2.modeling_gpt2.GPT2Attention.split_size", "5.23", (SIZES,),
        "GPT-2 splits its fused projection by this size, so it becomes smaller with the heads.",
        Check.SETS,
    ),
    Upstream(
        "transformers.GPT2Config", "5.23", (SIZES,),
        "None means four times the width; it is set when neurons are removed.",
        Check.HAS, ("n_inner",),
    ),
    Upstream(
        "transformers.pytorch_utils.Conv1D.nf", "5.23",
        ("core/host.py", "pruning/matrices.py"),
        "GPT-2's linear layer, which stores its weight transposed, is recognised by this attribute.",
        Check.SETS,
    ),
    Upstream(
        "transformers.pytorch_utils.Conv1D.nx", "5.23", ("core/counting.py", "pruning/matrices.py"),
        "The number of inputs of GPT-2's linear layer.",
        Check.SETS,
    ),
    # mixtures of experts
    Upstream(
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts.gate_up_proj", "5.23", (EXPERTS,),
        "Gate and up projection of all experts in one parameter. With another name, experts are not pruned.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts.down_proj", "5.23",
        (EXPERTS, "pruning/structure/depth.py", "pruning/matrices.py"),
        "The projection that reads the neurons of all experts.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts.intermediate_dim", "5.23",
        ("pruning/matrices.py", SIZES),
        "The number of neurons of each expert.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts.num_experts", "5.23",
        (SIZES, "quantization/layers/families.py"),
        "Distinguishes stacked matrices of experts from other tensors with three dimensions.",
        Check.SETS,
    ),
    Upstream(
        "transformers.models.mixtral.modeling_mixtral.MixtralTopKRouter.top_k", "5.23", (EXPERTS,),
        "The minimum number of experts that must be kept.",
        Check.SETS,
    ),
    Upstream(
        "transformers.integrations.moe.use_experts_implementation", "5.23", ("quantization/layers/families.py",),
        "Experts with `is_transposed` store their matrices transposed, and remain in floating point.",
        Check.TAKES, ("is_transposed",),
    ),
    Upstream(
        "transformers.MixtralConfig", "5.23", ("core/counting.py",),
        "The number of experts that compute each token.",
        Check.HAS, ("num_experts_per_tok",),
    ),
    Upstream(
        "transformers.MixtralConfig", "5.23", (SIZES,),
        "The number of experts, which becomes smaller when experts are removed.",
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
        "Returns the content of tokenizer.json.",
    ),
    Upstream(
        "transformers.PreTrainedTokenizerBase.vocab_files_names", "5.23", ("workflows/shrink_vocabulary.py",),
        "Files of older vocabulary formats are deleted, because they have the full vocabulary.",
    ),
    Upstream(
        "transformers.PreTrainedTokenizerBase.special_tokens_map", "5.23", ("distillation/store/format.py",),
        "A store identifies its tokenizer by vocabulary and special tokens.",
    ),
    Upstream(
        "transformers.PreTrainedTokenizerFast.is_fast", "5.23",
        ("distillation/teachers/retokenizer.py", "export/gguf/tokenizer.py"),
        "Only fast tokenizers have a tokenizer.json and give the positions of tokens in a text.",
    ),
)  # fmt: skip
