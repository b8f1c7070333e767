"""`cola generate`: continue prompts."""

from pathlib import Path

import typer

from launchers.output import print_json


def open_model(source: Path):
    """A model from a published folder, a run folder or a checkpoint folder."""
    from cola_megatron import ColaDLM
    from cola_megatron.interop.published import VAE_FOLDER

    return ColaDLM.from_published(source) if (source / VAE_FOLDER).is_dir() else ColaDLM.from_checkpoint(source)


def generate(
    model: Path = typer.Argument(..., help="Published folder, run folder or checkpoint folder."),
    prompt: list[str] = typer.Option(None, "--prompt", "-p", help="A prompt; repeat for several."),
    prompts_file: Path = typer.Option(None, help="One prompt per line."),
    steps: int = typer.Option(16, help="Euler steps per block."),
    guidance_scale: float = typer.Option(7.0, help="1 is no guidance."),
    max_new_tokens: int = typer.Option(32, help="Rounded up to whole blocks."),
    temperature: float = typer.Option(0.0, help="0 is greedy."),
    repetition_penalty: float = typer.Option(1.1, help="1 is none."),
    noise_seed: int = typer.Option(66, help="Seed of the latent noise."),
    as_json: bool = typer.Option(False, "--json", help="JSON with texts and token ids."),
) -> None:
    """Continue prompts with guided flow, block by block.

    Example: `cola generate runs/quickstart/export -p "The value of" --max-new-tokens 48`
    """
    from cola_megatron.config import ConfigError

    prompts = list(prompt or [])
    if prompts_file is not None:
        try:
            prompts += [line for line in prompts_file.read_text(encoding="utf-8").splitlines() if line]
        except OSError as error:
            raise ConfigError(f"{prompts_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{prompts_file}: not a text file (UTF-8)") from None
    if not prompts:
        raise ConfigError("give --prompt TEXT or --prompts-file FILE")
    loaded = open_model(model)
    try:
        outputs = loaded.generate(
            prompts,
            steps=steps,
            guidance_scale=guidance_scale,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            noise_seed=noise_seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if as_json:
        print_json(
            [
                {
                    "prompt": given,
                    "text": output.text,
                    "token_ids": output.token_ids.tolist(),
                    "prompt_tokens": output.prompt_tokens,
                }
                for given, output in zip(prompts, outputs, strict=True)
            ]
        )
        return
    for given, output in zip(prompts, outputs, strict=True):
        print(f"{given}\033[1m{output.text}\033[0m\n" if _is_terminal() else f"{given}{output.text}\n")


def _is_terminal() -> bool:
    import sys

    return sys.stdout.isatty()
