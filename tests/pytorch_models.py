"""The networks in PyTorch, to test ours against and to compare its speed with; parameters in the order of ours."""

from torch import nn


class Block(nn.Module):
    def __init__(self, before, after, stride, inplace):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after))
        self.shortcut = nn.Sequential() if stride == 1 and before == after else nn.Sequential(
            nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.relu = nn.ReLU(inplace)

    def forward(self, x):
        return self.relu(self.body(x) + self.shortcut(x))


def resnet18(width, classes=10, side=32, inplace=True):
    """ResNet-18 of any width for images of 32 x 32, or for photographs (side 64 or more)."""
    photographs = side > 32
    stem = nn.Conv2d(3, width, 7, 2, 3, bias=False) if photographs else nn.Conv2d(3, width, 3, 1, 1, bias=False)
    w = [width, width, 2 * width, 4 * width, 8 * width]
    blocks = [block for i in range(4) for block in (Block(w[i], w[i + 1], 1 + (i > 0), inplace),
                                                    Block(w[i + 1], w[i + 1], 1, inplace))]
    return nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(inplace),
                         *([nn.MaxPool2d(3, 2, 1)] if photographs else []), *blocks,
                         nn.AvgPool2d(side // (32 if photographs else 8)), nn.Flatten(),
                         nn.Linear(8 * width, classes))


def mlp(width):
    """One hidden layer for images that are flat."""
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
