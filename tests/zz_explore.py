from typing import Any
import copy, pickle, traceback, io, warnings
import torch, torch.distributed as dist
import torch.nn.functional as F
from torch import nn
import deepspeed_autotp as d
from tests.families import build, tokens

def attempt(fn):
    try: return fn()
    except Exception as e: return f"{type(e).__name__}: {str(e)[:700]}"

def losses_of(m, steps=2, **kw):
    opt = torch.optim.SGD(m.parameters(), lr=0.1); out=[]
    for s in range(steps):
        ids = tokens(s); loss = m(input_ids=ids, labels=ids, **kw).loss; loss.backward(); opt.step(); opt.zero_grad(); out.append(float(loss.detach()))
    return out
def fresh(**c): return build("llama", tied=False, **c)

def auto():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = losses_of(fresh())
        b = losses_of(d.parallelize(fresh(), tp_size=dist.get_world_size()))
    m = d.parallelize(fresh(), tp_size=dist.get_world_size())
    with torch.autocast("cpu", dtype=torch.bfloat16): c = losses_of(m)
    return a, b, c

def drop():
    out = {}
    tp = dist.get_world_size()
    for name, c in {"even": dict(attention_dropout=0.1), "uneven": dict(attention_dropout=0.1, num_attention_heads=12, num_key_value_heads=3, hidden_size=96)}.items():
        for impl in ("eager", "sdpa"):
            m = d.parallelize(fresh(attn_implementation=impl, **c), tp_size=tp)
            l = losses_of(m, 4); r = attempt(lambda: d.check_replicas(m))
            states = [None]*tp; dist.all_gather_object(states, torch.get_rng_state()[:100])
            out[name+impl] = (l, r, all(torch.equal(states[0], s) for s in states))
    return out

class Res(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m; self.drop = nn.Dropout(0.1)
def respost():
    """residual dropout + uneven"""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, AutoConfig, AutoModelForCausalLM
    out = {}
    tp = dist.get_world_size()
    for name, c in {"even": {}, "uneven": dict(num_attention_heads=12, num_key_value_heads=3, hidden_size=96)}.items():
        m = fresh(attention_dropout=0.1, attn_implementation="eager", **c)
        for layer in m.model.layers:
            layer.mlp.register_forward_hook(lambda mod, a, o: F.dropout(o, 0.1))
        m = d.parallelize(m, tp_size=tp)
        l = losses_of(m, 4); r = attempt(lambda: d.check_replicas(m))
        ls = [None]*tp; dist.all_gather_object(ls, l)
        out[name] = (ls, r)
    return out

def lora_parity():
    from peft import LoraConfig, get_peft_model
    out = {}
    tp = dist.get_world_size()
    def make(**k):
        m = build("llama", tied=False).double()
        torch.manual_seed(3)
        cfg = dict(r=4, target_modules=["q_proj","v_proj","o_proj","down_proj","up_proj"], task_type="CAUSAL_LM", init_lora_weights=False); cfg.update(k)
        return get_peft_model(m, LoraConfig(**cfg))
    for name, k in {"plain": {}, "embed": dict(target_modules=["q_proj","embed_tokens"]), "save": dict(modules_to_save=["lm_head"]), "dora": dict(use_dora=True), "bias": dict(bias="lora_only")}.items():
        def go():
            w = make(**k); lw = losses_of(w, 3)
            s = make(**k); train = sum(p.requires_grad for p in s.parameters())
            d.parallelize(s, tp_size=tp); assert train == sum(p.requires_grad for p in s.parameters())
            ls = losses_of(s, 3)
            full = d.full_state_dict(s)
            wd = max(float((full[n]-v).abs().max()) for n, v in w.state_dict().items())
            d.check_replicas(s)
            e = {x.name.split("layers.0.")[-1]: x.kind for x in d.tensor_parallel(s).plan.entries if "layers.1" not in x.name}
            return max(abs(a-b) for a,b in zip(lw,ls)), wd, e
        out[name] = str(attempt(go))[:1500]
    return out

def lora_rules():
    import logging
    from peft import LoraConfig, get_peft_model
    out = {}
    tp = dist.get_world_size()
    P = {"partition_config": {"use_default_specs": False, "layer_specs": [
        {"patterns": [r".*\.(q|k|v|gate|up)_proj\.(base_layer\.|lora_B\..*)?weight$"], "partition_type": "column"},
        {"patterns": [r".*\.(o|down)_proj\.(base_layer\.|lora_A\..*)?weight$"], "partition_type": "row"}]}}
    def make(kv=4, **k):
        m = build("llama", tied=False, num_key_value_heads=kv).double()
        torch.manual_seed(3)
        cfg = dict(r=4, target_modules=["q_proj","k_proj","v_proj","o_proj","down_proj","up_proj"], task_type="CAUSAL_LM", init_lora_weights=False); cfg.update(k)
        return get_peft_model(m, LoraConfig(**cfg))
    for name, k in {"plain": {}, "kv1": dict(kv=1), "dora": dict(use_dora=True), "rs": dict(use_rslora=True, r=6)}.items():
        def go():
            w = make(**k); lw = losses_of(w, 3)
            s = make(**k)
            d.parallelize(s, tp_size=tp, config=P)
            ls = losses_of(s, 3)
            full = d.full_state_dict(s)
            wd = max(float((full[n]-v).abs().max()) for n, v in w.state_dict().items())
            d.check_replicas(s)
            e = {x.name.split("layers.0.")[-1]: x.kind for x in d.tensor_parallel(s).plan.entries if "layers.0" in x.name and x.kind!="replicated"}
            return max(abs(a-b) for a,b in zip(lw,ls)), wd, e
        out[name] = str(attempt(go))[:1500]
    h = []
    class H(logging.Handler):
        def emit(self, r): h.append(r.getMessage())
    lg = logging.getLogger("deepspeed_autotp"); hh = H(); lg.addHandler(hh)
    d.parallelize(make(), tp_size=tp); lg.removeHandler(hh)
    out["notes"] = h
    return out
