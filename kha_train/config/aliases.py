"""Names of settings in other frameworks; errors suggest our name for them.

They come from Hugging Face's Trainer and model configurations, Megatron, DeepSpeed, nanoGPT, torchtitan, OLMo and
Lightning.
"""

from __future__ import annotations

_NAMES = {
    "run.steps": """max_steps num_steps n_steps total_steps train_steps training_steps max_train_steps num_train_steps
        num_training_steps train_iters max_iters num_iters iters iterations max_iterations num_iterations
        max_step total_iters""",
    "run.dir": """output_dir out_dir output outdir save_dir save_folder save_path log_dir logdir work_dir checkpoint_dir
        ckpt_dir default_root_dir dump_folder save run_dir""",
    "run.name": "run_name experiment_name exp_name job_name wandb_run_name wandb_name",
    "run.seed": "random_seed manual_seed rng_seed seed_everything",
    "data.seed": "data_seed shuffle_seed dataloader_seed",
    "run.init_from": """load load_from load_path pretrained pretrained_checkpoint pretrained_model model_name_or_path
        initial_load_path init_from_checkpoint finetune_from""",
    "run.branch_from": "branch fork_from resume_from_other continue_from",
    "model.layers": """num_layers n_layers n_layer nlayers num_hidden_layers depth num_blocks n_blocks
        encoder_num_layers""",
    "model.hidden_size": """d_model n_embd hidden_dim dim embed_dim embedding_dim model_dim emb_dim hidden n_embed width
        hidden_dimension""",
    "model.query_heads": """n_heads n_head num_heads nheads heads num_attention_heads attention_heads num_query_heads
        n_q_heads""",
    "model.kv_heads": "n_kv_heads n_kv_head num_kv_heads num_key_value_heads num_query_groups kv_head key_value_heads",
    "model.head_dim": "head_size d_head kv_channels dim_head attention_head_dim",
    "model.vocab_size": "n_vocab vocab vocabulary_size padded_vocab_size",
    "model.seq_len": """seq_length sequence_length max_seq_len max_seq_length max_sequence_length block_size
        context_length context_size ctx_len n_ctx max_length max_position_embeddings n_positions seqlen seq
        context encoder_seq_length""",
    "model.tie_embeddings": "tie_word_embeddings weight_tying tie_weights share_embeddings",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon",
    "model.rope_theta": "rotary_base rope_base rotary_emb_base theta",
    "model.rope_scaling": "rope_type",
    "model.rope_factor": "rope_scaling_factor scaling_factor",
    "model.rope_original_seq_len": "original_max_position_embeddings original_seq_len",
    "model.rope_attention_factor": "attention_factor attn_factor",
    "model.partial_rotary_factor": "rotary_percent rotary_pct rope_fraction",
    "model.init_std": "initializer_range init_method_std initializer_std",
    "moe.experts": "num_experts n_experts num_local_experts n_routed_experts num_routed_experts moe_num_experts",
    "moe.top_k": """topk num_experts_per_tok num_experts_per_token experts_per_token moe_router_topk moe_top_k
        router_topk""",
    "moe.expert_width": "moe_intermediate_size moe_ffn_hidden_size expert_dim expert_hidden_size moe_hidden_dim",
    "moe.shared_experts": "n_shared_experts num_shared_experts",
    "moe.dense_layers": "first_k_dense_replace",
    "moe.dense_width": "intermediate_size ffn_hidden_size ffn_dim d_ff mlp_hidden_size ffn_hidden",
    "moe.auxiliary_loss.weight": "aux_loss_coef router_aux_loss_coef moe_aux_loss_coeff aux_loss_weight",
    "moe.z_loss_weight": "z_loss moe_z_loss_coeff router_z_loss_coef z_loss_coef",
    "data.global_batch_size": """train_batch_size total_batch_size gbs global_bs global_train_batch_size
        effective_batch_size""",
    "data.batch_schedule": """rampup_batch_size batch_size_rampup batch_size_schedule batch_size_warmup batch_rampup
        batch_warmup batch_ramp""",
    "engine.micro_batch_size": """per_device_train_batch_size train_micro_batch_size_per_gpu device_batch_size mbs
        micro_batch per_gpu_batch_size local_batch_size device_train_microbatch_size microbatch_size
        per_gpu_train_batch_size""",
    "data.train": """data_path train_data dataset data_dir train_path train_file train_files train_data_path
        dataset_path""",
    "data.validation": "val_data valid_data eval_data validation_data val_path validation_file valid_data_path",
    "data.prefetch": "prefetch_factor num_workers",
    "optim.lr": "learning_rate max_lr peak_lr base_lr max_learning_rate peak_learning_rate",
    "optim.weight_decay": "wd decay_weight adam_weight_decay",
    "optim.betas": "adam_betas",
    "optim.eps": "adam_epsilon adam_eps epsilon",
    "optim.grad_clip": """max_grad_norm clip_grad grad_clip_norm gradient_clipping gradient_clip_val max_norm clip
        clip_grad_norm""",
    "optim.schedule.name": "lr_scheduler lr_scheduler_type lr_decay_style scheduler lr_schedule",
    "engine.zero_stage": "zero stage zero_stage_level deepspeed_stage",
    "engine.context_parallel": """context_parallel_size cp_size cp sequence_parallel sequence_parallel_size
        ulysses_sequence_parallel_size""",
    "engine.precision": "dtype torch_dtype mixed_precision params_dtype precision_type",
    "engine.activation_checkpointing": """gradient_checkpointing recompute recompute_activations recompute_granularity
        activation_checkpoint grad_checkpointing""",
    "engine.compile": "torch_compile",
    "engine.device": "device accelerator",
    "attention.backend": "attn_implementation attention_implementation attn_impl attention_backend",
    "attention.qk_norm": "qk_layernorm use_qk_norm",
    "attention.positions": "position_embedding_type pos_emb",
    "checkpoint.every_steps": """save_steps save_interval save_every checkpoint_interval checkpoint_every
        every_n_train_steps ckpt_every""",
    "checkpoint.keep_last": "save_total_limit keep_latest_k keep_checkpoints max_checkpoints",
    "validation.every_steps": "eval_steps eval_interval eval_every validation_interval val_check_interval",
    "validation.rows": "eval_iters eval_batches",
    "telemetry.wandb.project": "wandb_project project_name",
    "telemetry.wandb.mode": "wandb report_to use_wandb wandb_mode",
    "telemetry.console": "progress_bar verbose",
    "attention": "attn attention_type attention_variant",
    "optim": "optimizer optimiser opt",
    "engine": "strategy",
    "interaction@attention.interaction": "head_interaction",
}
ALIASES = {alias: name for name, aliases in _NAMES.items() for alias in aliases.split()}
"""Name elsewhere -> our setting or group of presets."""

_WORDS = {
    "data.global_batch_size is the rows of a step, engine.micro_batch_size those of one forward": "batch_size bs",
    "it follows: data.global_batch_size / (engine.micro_batch_size x ranks)": """gradient_accumulation_steps
        grad_accum_steps accumulate_grad_batches gradient_accumulation accumulation_steps grad_accum""",
    "a run counts steps: run.steps": "epochs num_epochs num_train_epochs max_epochs epoch",
    "a run counts steps: run.steps, each of data.global_batch_size x model.seq_len tokens": """max_tokens total_tokens
        train_tokens num_tokens""",
    "optim.schedule.warmup is a share of run.steps": """warmup_steps num_warmup_steps warmup_iters lr_warmup_iters
        warmup_ratio warmup lr_warmup_steps warmup_fraction lr_warmup_fraction""",
    "optim.schedule.final is a share of optim.lr": "min_lr end_lr min_lr_ratio final_lr lr_min",
    "optim.betas=[BETA1,BETA2]": "beta1 beta2 adam_beta1 adam_beta2",
    "engine.precision=bf16 or fp32": "bf16 fp16 fp32 amp half",
    "leave it out: no dropout here": "dropout attention_dropout hidden_dropout resid_dropout attn_dropout",
    "leave it out: every step is recorded": "log_interval logging_steps log_every log_every_n_steps log_freq",
    "leave it out: a run resumes by itself from what is in run.dir": """resume_from_checkpoint resume_from auto_resume
        load_checkpoint""",
    "ranks are the launcher's: kha train --ranks N ..., or torchrun --nproc-per-node N -m kha_train ...": """n_gpus
        num_gpus gpus devices nproc_per_node num_processes nnodes num_nodes world_size""",
    "leave it out: there is none; engine.zero_stage shards the state": """tensor_model_parallel_size
        pipeline_model_parallel_size tp pp tensor_parallel pipeline_parallel""",
    "leave it out: shards name their tokenizer (`kha data tokenize`)": "tokenizer tokenizer_name tokenizer_path",
    "name settings one by one, as KEY=VALUE": "config config_file config_name config_path c",
}
ADVICE = {alias: words for words, aliases in _WORDS.items() for alias in aliases.split()}
"""Settings of other frameworks that we lack or handle differently -> what to do."""


def own_name(key: str) -> str | None:
    """Our name of the setting that others call `key`, possibly with a section of theirs before it; None if unknown."""
    return ALIASES.get(_bare(key))


def advice(key: str) -> str | None:
    """What to do instead of the setting `key` of other frameworks; None where unknown."""
    return ADVICE.get(_bare(key))


def _bare(key: str) -> str:
    return key.rpartition(".")[2].strip("-").replace("-", "_").lower()
