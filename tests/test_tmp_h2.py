import json, shutil, sys, traceback, warnings
from pathlib import Path
import torch
from cond_pdiff import *
from cond_pdiff.hub import *
from diffusers import *
import pytest
def test_x(tiny_generator, tiny_backbone, tiny_zoo, tmp_path):
    def tryit(name, f):
        print("==", name)
        try: r = f(); print("   OK", type(r), str(r)[:200])
        except CondPDiffError as e: print("  ", type(e).__name__, "|", e)
        except BaseException as e: print("  !!RAW", type(e), str(e)[:300], traceback.format_tb(e.__traceback__)[-1][:200])
    pipe=CondPDiffPipeline.from_pretrained(tiny_generator)
    pipe.set_progress_bar_config(disable=True)
    P=TaskPrompt("Is the remark kind?", [("the film good","positive"),("the meal awful","negative")])
    g=lambda n,s=0: [torch.Generator().manual_seed(s+i) for i in range(n)]
    out=pipe(P, num_adapters=3, generator=g(3)); print(out.report, out.chosen); print(out.adapters[0].metadata)
    print(pipe.condition_index.threshold)
    for bad in ({"num_adapters":0},{"num_adapters":1.0},{"num_adapters":True},{"num_adapters":1001},{"num_inference_steps":0},{"num_inference_steps":1001},{"num_inference_steps":"5"},{"guidance_scale":-1},{"guidance_scale":float("nan")},{"guidance_scale":"2"},{"guidance_scale":True},{"generator":g(2)},{"generator":"x"},{"generator":5},{"generator":[1]},{"generator":(g(1)[0],)},{"output_type":"pil"},{"latents":torch.zeros(1,1,3)},{"latents":[1]},{"latents":torch.full((1,1,10),float("nan"))},{"callback_on_step_end_tensor_inputs":["nope"]},{"callback_on_step_end":5},{"condition":""},{"condition":5},{"condition":None},{"condition":[P]},{"condition":"the "*400},{"return_dict":1}, {"callback_on_step_end": lambda *a: {"nope": 1}}, {"callback_on_step_end_tensor_inputs":"latents"}, {"latents": torch.zeros(1,1,10,dtype=torch.long)}):
        tryit(bad, lambda: pipe(**{"condition":P, **bad}))
    a=pipe(P, generator=g(1)).adapter
    for dt in (torch.float16, torch.bfloat16, torch.float64):
        p=CondPDiffPipeline.from_pretrained(tiny_generator); p.set_progress_bar_config(disable=True)
        tryit(("to",dt), lambda: p.to(dt))
        tryit(("call",dt), lambda: p(P, num_adapters=2, generator=g(2)))
        tryit(("call g",dt), lambda: p("Is the film good?", guidance_scale=3.0))
        p=None
        def l():
            return CondPDiffPipeline.from_pretrained(tiny_generator, dtype=dt)
        tryit(("load",dt), l)
        tryit(("call",dt), lambda: (lambda q: (q.set_progress_bar_config(disable=True), q(P, num_adapters=2, generator=g(2))))(l()))
    for S in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler, LMSDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler, DEISMultistepScheduler, DPMSolverSDEScheduler, LCMScheduler, KDPM2DiscreteScheduler, DPMSolverSinglestepScheduler):
        def f():
            pipe.scheduler=S.from_config(pipe.scheduler.config)
            o=pipe(P, num_adapters=2, generator=g(2), num_inference_steps=8)
            s=pipe(P, generator=g(1,1), num_inference_steps=8)
            return (o.latents[1]-s.latents[0]).abs().max(), o.latents.std(), float((pipe(P, num_adapters=2, generator=g(2), num_inference_steps=8).latents-o.latents).abs().max())
        tryit(S.__name__, f)
    pipe.scheduler=DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    def cb(p, i, t, k):
        if i==2: p._interrupt=True
        print(i, t, list(k)); return k
    tryit("int", lambda: pipe(P, callback_on_step_end=cb))
