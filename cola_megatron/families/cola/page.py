"""What the page about a run says of Cola DLM."""

from cola_megatron.families.page import Page, Words

_ACCURACY = "share of held-out tokens that the decoder gives back from"

PAGE = Page(
    networks=(
        Words("vae.encoder", "text encoder", "q(z0 given x): from tokens to the posterior of the latents"),
        Words("dit", "diffusion prior (DiT)", "p(z0): predicts the velocity of each block from those before it"),
        Words("vae.decoder", "text decoder", "p(x given z0): from latents to logits"),
    ),
    figures=(
        Words("reconstruction_accuracy", "held-out reconstruction accuracy", f"{_ACCURACY} the posterior mean"),
        Words(
            "reconstruction_accuracy_t250",
            "  from latents at t = 0.25",
            f"{_ACCURACY} latents that are a quarter noise",
        ),
        Words("reconstruction_accuracy_t500", "  from latents at t = 0.5", f"{_ACCURACY} latents that are half noise"),
        Words("reconstruction_nll", "held-out reconstruction loss", "nats per token, from the posterior mean"),
        Words(
            "vae_logsnr", "VAE logSNR", "log of mean \u00b5\u00b2 over mean \u03c3\u00b2, in nats: signal above noise"
        ),
    ),
    stages=("Stage 1: Text VAE", "Stage 2: VAE and prior"),
    pictures=(
        "stage_one_losses",
        "stage_two_losses",
        "prior_over_steps",
        "flow_matching_by_time",
        "weighted_terms",
        "gradient_norm",
        "reconstruction_accuracy",
        "vae_logsnr",
        "posterior_dimensions",
        "speed_and_learning_rate",
        "generated_latents",
    ),
    sampling={"guidance_scale": 3.0, "steps": 16, "repetition_penalty": 1.0},
)
