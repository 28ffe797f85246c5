"""A causal MoE model, and what can be trained over its frozen weights.

loading   checkpoint -> model, tensor by tensor, one rank's experts only
moe       runs it
taps      hooks on routers and layers
spans     runs of layers, and what is constant below the targets
overlay   target experts and routers over a frozen model
inplace   baselines that train the model's own parameters
lora      the LoRA baseline, through peft
"""
