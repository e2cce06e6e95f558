"""What can be asked of a tensor whatever its values are."""

import torch


Tensor = torch.Tensor
METADATA = {
    *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.layout.__get__),
    *(Tensor.is_cuda.__get__, Tensor.is_cpu.__get__, Tensor.requires_grad.__get__, Tensor.grad_fn.__get__),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__),
    *(Tensor.data_ptr, Tensor.__repr__, Tensor.__hash__),
}
