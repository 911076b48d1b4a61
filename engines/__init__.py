"""What computes. An engine takes and returns arrays of its module xp; nn.py calls it and knows no device.

    name, xp, to_host(array), synchronize(), memory(), versions()       "cpu" or "gpu"; numpy or cupy; for records
    parameter(array), pattern(mask)        a parameter as it is stored; what the engine knows of a mask, or None
    narrow                                 a type of fewer bits than parameters have, in which gradients of weights of
                                           convolutions stay, or None
    moved                                  how often parameters or masks got another array, for what knows addresses
    masked(g, mask, pattern)               a masked parameter's gradient as it is kept until the step
    whole(kept, pattern)                   that of a mask with a pattern in the parameter's shape
    state_dict, load_state_dict            what chooses between ways of computing that round differently
    add(x, y)                              the sum of two gradients of one shape
    linear, linear_gradients               x w^T + b
    cross_entropy, cross_entropy_gradient  of logits and labels, with the sum of the loss and the correct answers
    weights, conv, conv_input_gradient, conv_weight_gradient            images are (N, C, H, W), weights (O, C, kh, kw)
    batch_norm, batch_norm_gradients       [+ add] [+ ReLU]
    max_pool, max_pool_gradient, mean_pool, mean_pool_gradient
    velocity, velocity_to_host, velocity_from_host, rate, sgd           one step for all parameters, in place
    compiled(function)                     the function, or what does the same with one launch
    Batches(images, labels, scale, shift, padding)                      batches of a data set of bytes
    normalized(pixels, scale, shift), upload(labels)                    a batch of photographs

Shapes, errors and formulas stand at the functions of cpu.Engine; gpu.Engine has the same.
"""

import math
import threading
from contextlib import contextmanager
from numbers import Real


class EngineError(RuntimeError):
    """Something that this machine cannot do; the message is one sentence."""


def whole(value, what, least=0):
    """value as an int; ValueError, which names it, unless it is a whole number of at least `least`."""
    number = plain(value)
    if not isinstance(number, Real) or not least <= number < math.inf or number != int(number):
        raise ValueError(f"{what} is a whole number of at least {least}, not {value!r}")
    return int(number)


def real(value, what, positive=False, most=math.inf):
    """value as a float; ValueError, which names it, unless it is a finite number of at least 0, or more, up to most."""
    number = plain(value)
    if not isinstance(number, Real) or not 0 <= number <= most or number == math.inf or positive and number == 0:
        limits = ("above 0" if positive else "of at least 0") + f" and at most {most}" * (most < math.inf)
        raise ValueError(f"{what} is a number {limits}, not {value!r}")
    return float(number)


def plain(value):
    """A number of NumPy, or an array of one without axes, as a Python number; what is neither as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def listed(values, what):
    """values as a list; TypeError, which names them, if they are none."""
    try:
        return list(None if isinstance(values, str) else values)
    except TypeError:
        raise TypeError(f"{what} is a list, not {str(values):.50}") from None


class Mode(threading.local):
    """Attributes that hold for a thread, and for a while: with mode.being(recording=False): ..."""

    @contextmanager
    def being(self, **attributes):
        before = {name: getattr(self, name) for name in attributes}
        vars(self).update(attributes)
        try:
            yield
        finally:
            vars(self).update(before)


def output_size(x, w, stride, padding):
    """(H, W) of the convolution of arrays of shapes x and w; raises ValueError for what does not fit together."""
    if len(x) != 4 or len(w) != 4 or x[1] != w[1] or 0 in x or 0 in w:
        raise ValueError("conv2d takes images (N, C, H, W) and weights (O, C, kh, kw) of one C, one or more of each, "
                         f"not {x} and {w}")
    size = tuple((n + 2 * padding - k) // stride + 1 for n, k in zip(x[2:], w[2:]))
    if min(size) < 1:
        raise ValueError(f"a {w[2]}x{w[3]} kernel does not fit images of {x[2]}x{x[3]} with padding {padding}")
    return size


def pool_size(x, size, stride, padding):
    """(H, W) of what pooling makes of images of shape x; raises ValueError unless windows of size x size fit."""
    if padding > size // 2 or min(x[2:]) + 2 * padding < size:
        raise ValueError(f"windows of {size}x{size} with stride {stride} and padding {padding} "
                         f"do not fit images of {x[2]}x{x[3]}")
    return tuple((n + 2 * padding - size) // stride + 1 for n in x[2:])
