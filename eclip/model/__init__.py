"""The model: two encoders, two projections and the instance decoder. It knows its settings and kernels, nothing above.

    images (B, 3, S, S) -> image_encoder -> (B, 1+N, vision_width) -> g_I -> cls (B, D), tokens (B, N, D)
    titles, packed      -> text_encoder  -> (n, text_width)        -> g_T -> (n, D)
    prompts: T of those D-vectors, of titles or images -> InstanceQueries -> queries (B, T, D)
    tokens, queries     -> instance_decoder -> slots (B, T, D): what the image holds of each prompt; and which token
                           went to which query
    slot x title        -> matching head -> do they belong together?

eclip.py               `ECLIP`, which joins the parts; training and evaluation call its methods
image_encoder.py       a ViT with timm's names      text_encoder.py  ragged text, pooled: BERT, CLIP, SigLIP
instance_decoder.py    slot attention over the tokens, self-attention among the queries
transformer.py         blocks that the three share  ragged.py        packed texts, attention inside each
residual.py            the stream's dtype           settings.py      `ModelConfig`

From outside: `set_text_attention` (text_encoder.py) chooses its kernel, `set_residual_dtype` what sums are rounded to.
"""
