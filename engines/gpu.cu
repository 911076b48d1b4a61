// The kernels of gpu.py: all of a training step but the convolutions.
//
// Compiled for each type of images: TYPE (float, double, bfloat16); REAL (float, double where TYPE is), in which
// parameters are kept and everything is computed; V, the channels that a thread takes at a time, as one word.
// Images are pixels of C channels in memory (NHWC), M = N H W of them. Blocks have 256 threads. Sums are over fixed
// parts in a fixed order, never by atomic additions: the same step gives the same bits.

struct bfloat16 { unsigned short bits; };
struct alignas(sizeof(TYPE) * V) Pack { TYPE at[V]; };
typedef long long integer;

union Word { float number; unsigned bits; };

__device__ __forceinline__ REAL get(float x) { return x; }
__device__ __forceinline__ REAL get(double x) { return x; }
__device__ __forceinline__ REAL get(bfloat16 x)
{
    Word w;
    w.bits = (unsigned)x.bits << 16;
    return w.number;
}
__device__ __forceinline__ void set(float& to, REAL x) { to = x; }
__device__ __forceinline__ void set(double& to, REAL x) { to = x; }
__device__ __forceinline__ void set(bfloat16& to, REAL x)
{
    Word w;
    w.number = x;
    if (x != x) to.bits = 0x7fff;  // rounding must not turn a NaN into infinity
    else to.bits = (w.bits + 0x7fff + (w.bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}

// Unfused on purpose: NumPy rounds between product and sum, and a batch should have the same bits on either device.
__device__ __forceinline__ float scaled(float x, float a, float b) { return __fadd_rn(__fmul_rn(x, a), b); }
__device__ __forceinline__ double scaled(double x, double a, double b) { return __dadd_rn(__dmul_rn(x, a), b); }

// A grid of any size covers all i below `count`, which is below 2^32: divisions of 32 bits are several times as fast.
#define EVERY(i, count) \
    for (integer i = blockIdx.x * (integer)blockDim.x + threadIdx.x; i < (count); i += gridDim.x * (integer)blockDim.x)

// Adds up what threads t, t + `width`, t + 2 `width`, ... of the block hold of K numbers, s[k][thread]; all threads
// have to call it after a __syncthreads(). The sums are then in s[k][t] for t < width, a power of two.
template <typename T, int K> __device__ void reduce(T (&s)[K][256], int width)
{
    const int t = threadIdx.x;
    for (int half = 128; half >= width; half /= 2) {
        if (t < half)
            for (int k = 0; k < K; k++) s[k][t] += s[k][t + half];
        __syncthreads();
    }
}

// Whether this is the last of `count` blocks to come here, all of which have to call it: what they wrote before can
// then be read, with __ldcg. counter: zero, and zero again afterwards.
__device__ __forceinline__ bool is_last(unsigned* counter, unsigned count)
{
    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(counter, count - 1) == count - 1;
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// ------------------------------------------------------------------------------------------------ batches

// x[i] = scale crop(image) + shift, y[i] = label, of the samples order[first], order[first + 1], ... (order null:
// first, first + 1, ...). images: bytes (n, C, H, W) that lie with these strides; x (size, H, W, channels), channels
// >= C, the rest zero; labels and y may be null. draws (3, count), or null: the crop's row and column in the image
// with `padding` zeros around it, and whether it is mirrored, for each place in the order. scale, shift: (C, H, W) or,
// unless `each`, (C,).
extern "C" __global__ void batch(const unsigned char* images, integer sn, integer sc, integer sh, integer sw,
    const integer* labels, const integer* order, const int* draws, integer first, integer count, int size, int C, int H,
    int W, int channels, int padding, const REAL* scale, const REAL* shift, int each, TYPE* x, integer* y)
{
    const integer entries = (integer)H * W * channels;
    EVERY(e, size * entries) {
        const unsigned u = e, i = u / (unsigned)entries;
        const int c = u % channels, w = u / channels % W, h = u / channels / W % H;
        const integer place = first + i, n = order ? order[place] : place;
        REAL value = 0;
        if (c < C) {
            int row = h, column = w;
            if (draws) {
                row += draws[place] - padding;
                column = (draws[2 * count + place] ? W - 1 - w : w) + draws[count + place] - padding;
            }
            const bool inside = row >= 0 && row < H && column >= 0 && column < W;
            const int pixel = inside ? images[n * sn + c * sc + row * sh + column * sw] : 0;
            const int entry = each ? (c * H + h) * W + w : c;
            value = scaled((REAL)pixel, scale[entry], shift[entry]);
        }
        set(x[e], value);
        if (y && u == i * (unsigned)entries) y[i] = labels[n];
    }
}

// y (N, H, W, channels) from x (N, C, H, W) with any strides, of TYPE or, if wide, of REAL; further channels are zero.
extern "C" __global__ void to_images(const void* x, int wide, integer sn, integer sc, integer sh, integer sw, int C,
    int H, int W, int channels, integer count, TYPE* y)
{
    EVERY(i, count) {
        const unsigned u = i, c = u % channels, w = u / channels % W, h = u / channels / W % H,
            n = u / channels / W / H;
        const integer from = n * sn + c * sc + h * sh + w * sw;
        set(y[i], c >= C ? (REAL)0 : wide ? ((const REAL*)x)[from] : get(((const TYPE*)x)[from]));
    }
}

// ------------------------------------------------------------------------------------------------ BatchNorm
// Sums over pixels are made by a grid of blocks: blockIdx.x says which channels, `lanes` (a power of two) packs of
// them, blockIdx.y which part of the pixels. The last block of a column to end adds up what its parts gave, in their
// order, and goes on from there: one launch instead of two.

#define CHANNELS (lanes * V)  // of a block: a power of two, at most 256

// Each thread has found two numbers for each channel of the pack in its lane: their sums over the block go to sums
// (parts, 2, C). Whether this block is the last of its column, by the counter of the column.
__device__ __forceinline__ bool add_up(REAL (&s)[2 * V][256], const REAL* first, const REAL* second, int C, int lanes,
    REAL* sums, unsigned* counters)
{
    const int t = threadIdx.x, lane = blockIdx.x * lanes + t;
    for (int v = 0; v < V; v++) s[v][t] = first[v], s[V + v][t] = second[v];
    __syncthreads();
    reduce(s, lanes);
    if (t < lanes && lane * V < C)
        for (int v = 0; v < V; v++) {
            sums[2 * blockIdx.y * C + lane * V + v] = s[v][t];
            sums[(2 * blockIdx.y + 1) * C + lane * V + v] = s[V + v][t];
        }
    return is_last(&counters[blockIdx.x], gridDim.y);
}

// A sum to which numbers are added by Kahan's rule: what rounding took from the last is given back with the next. In
// double it would be as exact, and many times slower on most cards.
struct Sum {
    REAL sum, lost;
    __device__ __forceinline__ void add(REAL x)
    {
        const REAL y = x - lost, next = sum + y;
        lost = next - sum - y;
        sum = next;
    }
    __device__ __forceinline__ double get() const { return (double)sum - lost; }
};

// Adds up the sums of all parts: those of channel blockIdx.x CHANNELS + t are then in s[0][t] and s[1][t].
__device__ __forceinline__ void over_parts(const REAL* sums, int C, int lanes, double (&s)[2][256])
{
    const int t = threadIdx.x, c = blockIdx.x * CHANNELS + t % CHANNELS;
    Sum first = {0, 0}, second = {0, 0};
    if (c < C)
        for (int i = t / CHANNELS; i < gridDim.y; i += 256 / CHANNELS) {
            first.add(__ldcg(&sums[2 * i * C + c]));
            second.add(__ldcg(&sums[(2 * i + 1) * C + c]));
        }
    s[0][t] = first.get(), s[1][t] = second.get();
    __syncthreads();
    reduce(s, CHANNELS);
}

// saved (4, C): mean, 1 / deviation, and scale and shift of weight (x - mean) / deviation + bias for each channel of x;
// the running estimates move towards them. If training, from the sums of x - near and of (x - near)^2, near being the
// channel's first entry, so that nothing cancels; else from the running estimates, by one part of blocks.
extern "C" __global__ __launch_bounds__(256) void batch_statistics(const TYPE* x, integer M, int C, int lanes,
    int training, const REAL* weight, const REAL* bias, REAL* running_mean, REAL* running_var, double momentum,
    double eps, REAL* sums, unsigned* counters, REAL* saved)
{
    __shared__ REAL s[2 * V][256];
    __shared__ double total[2][256];
    const int t = threadIdx.x, packs = C / V, lane = blockIdx.x * lanes + t % lanes, rows = 256 / lanes;
    const int c = blockIdx.x * CHANNELS + t;  // of those that this thread finishes
    if (training) {
        REAL first[V], second[V], near[V];
        for (int v = 0; v < V; v++) first[v] = second[v] = near[v] = 0;
        if (lane < packs) {
            for (int v = 0; v < V; v++) near[v] = get(x[lane * V + v]);
            for (integer i = blockIdx.y * rows + t / lanes; i < M; i += gridDim.y * rows) {
                const Pack p = ((const Pack*)x)[i * packs + lane];
                for (int v = 0; v < V; v++) {
                    const REAL d = get(p.at[v]) - near[v];
                    first[v] += d;
                    second[v] += d * d;
                }
            }
        }
        if (!add_up(s, first, second, C, lanes, sums, counters)) return;
        over_parts(sums, C, lanes, total);
    }
    if (t >= CHANNELS || c >= C) return;
    double mean = running_mean[c], var = running_var[c];
    if (training) {
        const double d = total[0][t] / M;
        mean = get(x[c]) + d;
        var = fmax(total[1][t] / M - d * d, 0.0);
        running_mean[c] += momentum * (mean - running_mean[c]);
        running_var[c] += momentum * (var * M / (M - 1.0) - running_var[c]);
    }
    const double slope = 1 / sqrt(var + eps);
    saved[c] = mean;
    saved[C + c] = slope;
    saved[2 * C + c] = weight[c] * slope;
    saved[3 * C + c] = bias[c] - mean * weight[c] * slope;
}

// y = scale x + shift (+ add), then max(., 0) if relu; count: packs
extern "C" __global__ void normalize(const TYPE* x, const TYPE* add, const REAL* saved, int relu, int C, integer count,
    TYPE* y)
{
    EVERY(i, count) {
        const int c = (unsigned)i % (C / V) * V;
        const Pack p = ((const Pack*)x)[i], q = add ? ((const Pack*)add)[i] : p;
        Pack out;
        for (int v = 0; v < V; v++) {
            REAL value = get(p.at[v]) * saved[2 * C + c + v] + saved[3 * C + c + v];
            if (add) value += get(q.at[v]);
            set(out.at[v], relu && !(value > 0) && value == value ? (REAL)0 : value);  // a NaN stays
        }
        ((Pack*)y)[i] = out;
    }
}

// The gradient of a pack behind the ReLU, 0 where out = 0 (out null: no ReLU): g, or g + more unless more is null
__device__ __forceinline__ void gradient(const TYPE* g, const TYPE* more, const TYPE* out, integer i, REAL (&value)[V])
{
    const Pack pg = ((const Pack*)g)[i], pm = more ? ((const Pack*)more)[i] : pg, po = out ? ((const Pack*)out)[i] : pg;
    for (int v = 0; v < V; v++) {
        value[v] = get(pg.at[v]);
        if (more) value[v] += get(pm.at[v]);
        if (out && !(get(po.at[v]) > 0)) value[v] = 0;
    }
}

// dweight = sum g (x - mean) / deviation, dbias = sum g, and terms (3, C) a, b, c with dx = a g + b x + c:
// dx = weight / deviation (g - dbias / M - xhat dweight / M); with constant statistics weight / deviation g.
extern "C" __global__ __launch_bounds__(256) void gradient_statistics(const TYPE* g, const TYPE* more, const TYPE* x,
    const TYPE* out, integer M, int C, int lanes, int training, const REAL* saved, REAL* sums, unsigned* counters,
    REAL* dweight, REAL* dbias, REAL* terms)
{
    __shared__ REAL s[2 * V][256];
    __shared__ double total[2][256];
    const int t = threadIdx.x, packs = C / V, lane = blockIdx.x * lanes + t % lanes, rows = 256 / lanes;
    REAL first[V], second[V], middle[V], value[V];
    for (int v = 0; v < V; v++) first[v] = second[v] = middle[v] = 0;
    if (lane < packs) {
        for (int v = 0; v < V; v++) middle[v] = saved[lane * V + v];
        for (integer i = blockIdx.y * rows + t / lanes; i < M; i += gridDim.y * rows) {
            const Pack p = ((const Pack*)x)[i * packs + lane];
            gradient(g, more, out, i * packs + lane, value);
            for (int v = 0; v < V; v++) {
                first[v] += value[v];
                second[v] += value[v] * (get(p.at[v]) - middle[v]);
            }
        }
    }
    if (!add_up(s, first, second, C, lanes, sums, counters)) return;
    over_parts(sums, C, lanes, total);
    const int c = blockIdx.x * CHANNELS + t;
    if (t >= CHANNELS || c >= C) return;
    const double mean = saved[c], slope = saved[C + c], scale = saved[2 * C + c];
    const double dw = total[1][t] * slope, b = training ? -scale * dw * slope / M : 0;
    dweight[c] = dw;
    dbias[c] = total[0][t];
    terms[c] = scale;
    terms[C + c] = b;
    terms[2 * C + c] = training ? -scale * total[0][t] / M - b * mean : 0;
}

// dx = a g + b x + c with the gradient behind the ReLU, which also goes to dadd unless that is null
extern "C" __global__ void normalize_gradient(const TYPE* g, const TYPE* more, const TYPE* x, const TYPE* out,
    const REAL* terms, int C, integer count, TYPE* dx, TYPE* dadd)
{
    EVERY(i, count) {
        const int c = (unsigned)i % (C / V) * V;
        const Pack p = ((const Pack*)x)[i];
        REAL value[V];
        Pack d, behind;
        gradient(g, more, out, i, value);
        for (int v = 0; v < V; v++) {
            set(behind.at[v], value[v]);
            set(d.at[v], terms[c + v] * value[v] + terms[C + c + v] * get(p.at[v]) + terms[2 * C + c + v]);
        }
        ((Pack*)dx)[i] = d;
        if (dadd) ((Pack*)dadd)[i] = behind;
    }
}

extern "C" __global__ void add_images(const TYPE* x, const TYPE* y, integer count, TYPE* out)
{
    EVERY(i, count) {
        const Pack p = ((const Pack*)x)[i], q = ((const Pack*)y)[i];
        Pack sum;
        for (int v = 0; v < V; v++) set(sum.at[v], get(p.at[v]) + get(q.at[v]));
        ((Pack*)out)[i] = sum;
    }
}

// ------------------------------------------------------------------------------------------------ pooling

// y (N, C): the mean over the `pixels` of each image; count = N C
extern "C" __global__ void mean_pool(const TYPE* x, int pixels, int C, integer count, REAL* y)
{
    EVERY(i, count) {
        REAL sum = 0;
        const TYPE* image = x + (unsigned)i / C * (integer)pixels * C + (unsigned)i % C;
        for (int p = 0; p < pixels; p++) sum += get(image[(integer)p * C]);
        y[i] = sum / pixels;
    }
}

extern "C" __global__ void mean_pool_gradient(const REAL* g, int pixels, int C, integer count, TYPE* dx)
{
    EVERY(i, count) set(dx[i], g[(unsigned)i / C / pixels * C + (unsigned)i % C] / pixels);
}

// The largest entry of each window, the first of equals, and which it is; count = N h w C
extern "C" __global__ void max_pool(const TYPE* x, int C, int H, int W, int size, int stride, int padding, int h, int w,
    integer count, TYPE* y, unsigned short* which)
{
    EVERY(i, count) {
        const unsigned u = i;
        const int c = u % C, column = (int)(u / C % w) * stride - padding;
        const int row = (int)(u / C / w % h) * stride - padding;
        const TYPE* image = x + (integer)(u / C / w / h) * H * W * C;
        bool found = false;
        REAL best = 0;
        int place = 0;
        for (int k = 0; k < size * size; k++) {
            const int r = row + k / size, q = column + k % size;
            if (r < 0 || r >= H || q < 0 || q >= W) continue;
            const REAL value = get(image[((integer)r * W + q) * C + c]);
            if (!found || value > best || value != value) best = value, place = k, found = true;
        }
        set(y[i], best);
        which[i] = place;
    }
}

// dx: of each pixel, the gradients of the windows of which it is the largest; count = N H W C
extern "C" __global__ void max_pool_gradient(const TYPE* g, const unsigned short* which, int C, int H, int W, int size,
    int stride, int padding, int h, int w, integer count, TYPE* dx)
{
    EVERY(i, count) {
        const unsigned u = i;
        const int c = u % C, column = u / C % W + padding, row = u / C / W % H + padding;
        const integer first = (integer)(u / C / W / H) * h * w * C;
        REAL sum = 0;
        for (int r = row < size ? 0 : (row - size) / stride + 1; r < h && r * stride <= row; r++)
            for (int q = column < size ? 0 : (column - size) / stride + 1; q < w && q * stride <= column; q++) {
                const integer j = first + ((integer)r * w + q) * C + c;
                if (which[j] == (row - r * stride) * size + column - q * stride) sum += get(g[j]);
            }
        set(dx[i], sum);
    }
}

// ------------------------------------------------------------------------------------------------ linear layers

// c[m, n] = sum over k of a[m, k] b[k, n] (+ bias[n]), c contiguous; strides of a and b in entries. A block makes
// 64 x 64 of c, each thread 4 x 4, while what it needs next is on its way from memory. Where c has few such tiles,
// `parts` blocks share each, every one with a part of K: the last to end adds up what they left in `partial`
// (parts, M, N), by the counter of the tile.
extern "C" __global__ __launch_bounds__(256) void product(const REAL* a, const REAL* b, const REAL* bias, REAL* c,
    int M, int N, int K, integer a_row, integer a_column, integer b_row, integer b_column, int parts, REAL* partial,
    unsigned* counters)
{
    __shared__ REAL as[16][65], bs[16][65];  // 65: threads that store a column of them use different banks
    const int t = threadIdx.x, tile = blockIdx.x / parts, part = blockIdx.x % parts;
    const int top = blockIdx.y * 64, left = tile * 64, row = t / 16, column = t % 16;
    const int each = (K + 16 * parts - 1) / (16 * parts) * 16, begin = part * each;
    const int end = begin + each < K ? begin + each : K;
    REAL sum[4][4], next_a[4], next_b[4];
    // Neighbouring threads load along the direction that is contiguous: place e of a tile is (k, m) or (k, n).
    const auto row_a = [&](int e) { return a_column == 1 ? e % 16 : e / 64; };
    const auto column_a = [&](int e) { return a_column == 1 ? e / 16 : e % 64; };
    const auto row_b = [&](int e) { return b_column == 1 ? e / 64 : e % 16; };
    const auto column_b = [&](int e) { return b_column == 1 ? e % 64 : e / 16; };
    const auto load = [&](int first) {
        for (int i = 0; i < 4; i++) {
            const int e = t + 256 * i;
            int k = first + row_a(e), m = top + column_a(e), n = left + column_b(e);
            next_a[i] = m < M && k < end ? a[m * a_row + k * a_column] : (REAL)0;
            k = first + row_b(e);
            next_b[i] = n < N && k < end ? b[k * b_row + n * b_column] : (REAL)0;
        }
    };
    for (int i = 0; i < 16; i++) sum[i / 4][i % 4] = 0;
    load(begin);
    for (int first = begin; first < end; first += 16) {
        for (int i = 0; i < 4; i++) {
            const int e = t + 256 * i;
            as[row_a(e)][column_a(e)] = next_a[i];
            bs[row_b(e)][column_b(e)] = next_b[i];
        }
        __syncthreads();
        load(first + 16);
        for (int k = 0; k < 16; k++)
            for (int i = 0; i < 16; i++) sum[i / 4][i % 4] += as[k][row + i / 4 * 16] * bs[k][column + i % 4 * 16];
        __syncthreads();
    }
    const auto each_entry = [&](auto work) {
        for (int i = 0; i < 16; i++) {
            const int m = top + row + i / 4 * 16, n = left + column + i % 4 * 16;
            if (m < M && n < N) work(sum[i / 4][i % 4], (integer)m * N + n, n);
        }
    };
    if (parts > 1) {
        const integer size = (integer)M * N;
        each_entry([&](REAL& s, integer place, int) { partial[part * size + place] = s; });
        if (!is_last(&counters[blockIdx.y * (gridDim.x / parts) + tile], parts)) return;
        each_entry([&](REAL& s, integer place, int) {
            s = 0;
            for (int p = 0; p < parts; p++) s += __ldcg(&partial[p * size + place]);
        });
    }
    each_entry([&](REAL& s, integer place, int n) { c[place] = s + (bias ? bias[n] : (REAL)0); });
}

// loss = mean over N rows of -log softmax(logits)[label]; dlogits (unless null) its gradient (softmax - onehot) / N;
// sums = (N loss, how many rows have their largest logit, the first of equals, at the label). One block.
extern "C" __global__ __launch_bounds__(256) void cross_entropy(const REAL* logits, const integer* labels, int N, int K,
    REAL* loss, REAL* dlogits, double* sums)
{
    __shared__ double s[2][256];
    const int t = threadIdx.x;
    double total = 0, correct = 0;
    for (integer n = t; n < N; n += 256) {
        const REAL* z = logits + n * K;
        const integer label = labels[n];
        int top = 0;
        for (int k = 1; k < K; k++)
            if (z[k] > z[top]) top = k;
        REAL sum = 0;
        for (int k = 0; k < K; k++) sum += exp(z[k] - z[top]);
        total += log(sum) - ((label >= 0 && label < K ? z[label] : (REAL)nan("")) - z[top]);  // NaN: no such class
        correct += top == label;
        if (dlogits)
            for (int k = 0; k < K; k++) dlogits[n * K + k] = (exp(z[k] - z[top]) / sum - (k == label)) / N;
    }
    s[0][t] = total, s[1][t] = correct;
    __syncthreads();
    reduce(s, 1);
    if (t == 0) {
        loss[0] = s[0][0] / N;
        sums[0] = s[0][0];
        sums[1] = s[1][0];
    }
}

// ------------------------------------------------------------------------------------------------ optimiser

struct Part {  // a parameter
    REAL *w, *v;                // values, and velocity (null without momentum)
    const void* g;              // gradient, of REAL or, if narrow, of TYPE
    const unsigned char* mask;  // which entries are kept (null: all)
    TYPE* copy;                 // of the values in the type of images (null: there is none)
    unsigned size;
    int C, channels;            // a narrow gradient and the copy have `channels` entries for each C
    int narrow;
};
struct Parts { Part at[64]; };

// One step of SGD (nn.SGD) for up to 64 parameters; masked entries are not touched.
extern "C" __global__ void sgd(const Parts parts, const double* rate, double momentum, double weight_decay,
    int nesterov)
{
    const Part p = parts.at[blockIdx.y];
    const REAL lr = *rate, mu = momentum, decay = weight_decay;
    EVERY(i, p.size) {
        if (p.mask && !p.mask[i]) continue;
        const unsigned u = i, j = p.channels == p.C ? u : u / p.C * p.channels + u % p.C;
        const REAL w = p.w[i];
        REAL g = (p.narrow ? get(((const TYPE*)p.g)[j]) : ((const REAL*)p.g)[i]) + decay * w;
        if (p.v) {
            const REAL v = p.v[i] = mu * p.v[i] + g;
            g = nesterov ? g + mu * v : v;
        }
        const REAL next = w - lr * g;
        p.w[i] = next;
        if (p.copy) set(p.copy[j], next);
    }
}
