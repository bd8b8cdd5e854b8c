"""The training step as a pure function of a state, a key and a batch."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax import Array, lax
from jaxtyping import Float, Int, Key


class State(TrainState):
    """Step, parameters and optimizer state, and the running averages of batch normalization."""

    batch_stats: Any


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """How many whole batches there are. Other examples are left over in each epoch."""
    return examples // batch_size


def create_state(
    network: nn.Module, key: Key[Array, ""], learning_rate: float, total_steps: int
) -> State:
    """A network's first state, with AdamW, warm-up, cosine decay and clipping by global norm."""
    variables = network.init(key, jnp.zeros((1, 8, 8, 1)))
    schedule = optax.warmup_cosine_decay_schedule(
        0, learning_rate, warmup_steps=max(1, total_steps // 10), decay_steps=max(2, total_steps)
    )
    state = State.create(
        apply_fn=network.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)),
    )
    return state.replace(step=jnp.zeros((), jnp.int32))  # As the steps leave it.


def shuffled_batches(
    key: Key[Array, ""], examples: int, batch_size: int
) -> Int[Array, "steps batch_size"]:
    """The whole batches of an epoch, each as the indices of its examples."""
    steps = steps_per_epoch(examples, batch_size)
    return jax.random.permutation(key, examples)[: steps * batch_size].reshape(steps, batch_size)


# A step a program, not an epoch: inside lax.scan XLA:CPU convolves nine times as slowly.
@functools.partial(jax.jit, donate_argnums=0)
def train_step(
    state: State,
    key: Key[Array, ""],
    images: Float[Array, "batch 8 8 1"],
    labels: Int[Array, " batch"],
) -> tuple[State, Float[Array, ""], Int[Array, ""]]:
    """Takes one step; also under `jax.vmap` over states and keys, for several seeds at once.

    Args:
        state: Donated: its buffers become those of the new state.
        key: Decides the augmentation, with the step's number.
        images: The batch; how it lies on the devices decides where its parts are computed.
        labels: Their labels.

    Returns:
        The new state, the batch's loss in nats, and how many it put in their class.
    """
    images = shifted(jax.random.fold_in(key, state.step), images)

    def loss_and_rest(params):
        logits, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits, updated.get("batch_stats", {}))

    gradient_of = jax.value_and_grad(loss_and_rest, has_aux=True)
    (loss, (logits, batch_stats)), gradients = gradient_of(state.params)
    state = state.apply_gradients(grads=gradients, batch_stats=batch_stats)
    return state, loss, (logits.argmax(-1) == labels).sum()


def shifted(
    key: Key[Array, ""], images: Float[Array, "batch height width 1"]
) -> Float[Array, "batch height width 1"]:
    """Moves each image by up to one pixel along both axes; zeros come in at the border."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 3)

    def crop(image, corner):
        return lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, 1))

    return jax.vmap(crop)(padded, corners)


@jax.jit
def correct_predictions(
    state: State, images: Float[Array, "examples 8 8 1"], labels: Int[Array, " examples"]
) -> Int[Array, ""]:
    """How many of the images the network puts in their class."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return (state.apply_fn(variables, images).argmax(-1) == labels).sum()
