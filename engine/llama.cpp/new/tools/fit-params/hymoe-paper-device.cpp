#include "hymoe-paper-device.h"

#include "ggml-backend-impl.h"
#include "ggml.h"

#include <cstdlib>
#include <memory>
#include <vector>

namespace {

struct paper_device {
    std::string name;
    std::string host_name;
    size_t      n_bytes = 0;

    ggml_backend_device      device {};
    ggml_backend_reg         reg {};
    ggml_backend_buffer_type memory {};
    ggml_backend_buffer_type host {}; // the host's memory that the card reads without a detour
};

paper_device & of(ggml_backend_dev_t dev) {
    return *static_cast<paper_device *>(dev->context);
}

// -- memory -----------------------------------------------------------------------------------------------------------

constexpr size_t  PAPER_ALIGNMENT   = 128;
constexpr int64_t PAPER_ROW_PADDING = 512; // values: CUDA's kernels read rows of quantized matrices in pieces of these

const char * memory_name(ggml_backend_buffer_type_t buft) {
    return of(buft->device).name.c_str();
}

const char * host_name(ggml_backend_buffer_type_t buft) {
    return of(buft->device).host_name.c_str();
}

ggml_backend_buffer_t no_buffer(ggml_backend_buffer_type_t /*buft*/, size_t /*size*/) {
    return nullptr;
}

// The few bytes that are allocated even when nothing is to be allocated: the buffer of a batch's outputs.
ggml_backend_buffer_t host_buffer(ggml_backend_buffer_type_t /*buft*/, size_t size) {
    return ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
}

size_t memory_alignment(ggml_backend_buffer_type_t /*buft*/) {
    return PAPER_ALIGNMENT;
}

size_t host_alignment(ggml_backend_buffer_type_t /*buft*/) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

// Flash attention reads keys and values in F16: those of another type are converted behind its result, unless there
// are only one or two queries.
size_t attention_size(const ggml_tensor * op) {
    size_t size = ggml_nbytes(op);
    for (const ggml_tensor * cached : { op->src[1], op->src[2] }) {
        if (op->src[0]->ne[1] > 2 && cached->type != GGML_TYPE_F16) {
            size = GGML_PAD(size, PAPER_ALIGNMENT) + ggml_nelements(cached) * sizeof(ggml_fp16_t);
        }
    }
    return size;
}

size_t memory_size(ggml_backend_buffer_type_t /*buft*/, const ggml_tensor * tensor) {
    size_t size = tensor->op == GGML_OP_FLASH_ATTN_EXT ? attention_size(tensor) : ggml_nbytes(tensor);
    const int64_t rest = tensor->ne[0] % PAPER_ROW_PADDING;
    if (ggml_is_quantized(tensor->type) && rest != 0) {
        size += ggml_row_size(tensor->type, PAPER_ROW_PADDING - rest);
    }
    return size;
}

bool is_host(ggml_backend_buffer_type_t /*buft*/) {
    return true;
}

// -- the backend ------------------------------------------------------------------------------------------------------

const char * backend_name(ggml_backend_t backend) {
    return of(backend->device).name.c_str();
}

void backend_free(ggml_backend_t backend) {
    delete backend;
}

ggml_status backend_compute(ggml_backend_t /*backend*/, ggml_cgraph * /*graph*/) {
    return GGML_STATUS_FAILED;
}

// -- the device -------------------------------------------------------------------------------------------------------

const char * device_name(ggml_backend_dev_t dev) {
    return of(dev).name.c_str();
}

const char * device_description(ggml_backend_dev_t /*dev*/) {
    return "a card on paper";
}

void device_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) {
    *free = *total = of(dev).n_bytes;
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t /*dev*/) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    props->name        = device_name(dev);
    props->description = device_description(dev);
    props->device_id   = nullptr;
    props->type        = device_type(dev);
    device_memory(dev, &props->memory_free, &props->memory_total);
    props->caps = {
        /* .async                = */ true,
        /* .host_buffer          = */ true,
        /* .buffer_from_host_ptr = */ false,
        /* .events               = */ true, // several cards work as a pipeline, which takes memory
        /* .mmap_support         = */ true,
    };
}

ggml_backend_t device_init(ggml_backend_dev_t dev, const char * /*params*/) {
    static ggml_guid guid = { 'h', 'y', 'm', 'o', 'e', ' ', 'p', 'a', 'p', 'e', 'r', ' ', 'c', 'a', 'r', 'd' };
    auto * backend = new ggml_backend();
    backend->guid                = &guid;
    backend->iface.get_name      = backend_name;
    backend->iface.free          = backend_free;
    backend->iface.graph_compute = backend_compute;
    backend->device              = dev;
    return backend;
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t dev) {
    return &of(dev).memory;
}

ggml_backend_buffer_type_t device_host_buffer_type(ggml_backend_dev_t dev) {
    return &of(dev).host;
}

// What the graphs of our models are made of; a function of the host's is never a card's.
bool device_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    for (const ggml_tensor * src : op->src) {
        // as CUDA: weights of another card are copied, not read there
        if (src && src->buffer && src->buffer->buft->iface.get_name == memory_name && src->buffer->buft->device != dev) {
            return false;
        }
    }
    return op->op != GGML_OP_CUSTOM && op->op != GGML_OP_MAP_CUSTOM1 && op->op != GGML_OP_MAP_CUSTOM2 &&
           op->op != GGML_OP_MAP_CUSTOM3;
}

bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    return buft == &of(dev).memory;
}

// As in all backends that offload: the tokens of a product by experts are the third dimension.
bool device_offload_op(ggml_backend_dev_t /*dev*/, const ggml_tensor * op) {
    const char * asked = getenv("GGML_OP_OFFLOAD_MIN_BATCH");
    const int64_t least = asked ? atoi(asked) : 32;
    switch (op->op) {
        case GGML_OP_GET_ROWS:
            return false;
        case GGML_OP_MUL_MAT:
            return op->ne[1] >= least;
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ROPE:
            return op->ne[2] >= least;
        default:
            return ggml_nrows(op) >= least;
    }
}

// -- the registry -----------------------------------------------------------------------------------------------------

const char * reg_name(ggml_backend_reg_t /*reg*/) {
    return "Paper";
}

size_t reg_count(ggml_backend_reg_t /*reg*/) {
    return 1;
}

ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t /*index*/) {
    return &static_cast<paper_device *>(reg->context)->device;
}

void * reg_address(ggml_backend_reg_t /*reg*/, const char * /*name*/) {
    return nullptr;
}

} // namespace

ggml_backend_dev_t hymoe_paper_device(const std::string & name, size_t n_bytes) {
    static std::vector<std::unique_ptr<paper_device>> all; // buffers and backends point to them
    all.push_back(std::make_unique<paper_device>());
    paper_device & made = *all.back();

    made.name      = name;
    made.host_name = name + "_Host";
    made.n_bytes   = n_bytes;

    made.reg.api_version = GGML_BACKEND_API_VERSION;
    made.reg.iface       = { reg_name, reg_count, reg_device, reg_address };
    made.reg.context     = &made;

    ggml_backend_device_i & device = made.device.iface;
    device.get_name             = device_name;
    device.get_description      = device_description;
    device.get_memory           = device_memory;
    device.get_type             = device_type;
    device.get_props            = device_props;
    device.init_backend         = device_init;
    device.get_buffer_type      = device_buffer_type;
    device.get_host_buffer_type = device_host_buffer_type;
    device.supports_op          = device_supports_op;
    device.supports_buft        = device_supports_buft;
    device.offload_op           = device_offload_op;
    made.device.reg     = &made.reg;
    made.device.context = &made;

    made.memory = { { memory_name, no_buffer, memory_alignment, nullptr, memory_size, nullptr }, &made.device, nullptr };
    made.host   = { { host_name, host_buffer, host_alignment, nullptr, nullptr, is_host }, &made.device, nullptr };

    ggml_backend_register(&made.reg);
    return &made.device;
}
