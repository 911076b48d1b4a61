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

// y (pixels, C) of REAL, from x (pixels, channels) of TYPE
extern "C" __global__ void from_images(const TYPE* x, int C, int channels, integer count, REAL* y)
{
    EVERY(i, count) y[i] = get(x[(unsigned)i / C * (integer)channels + (unsigned)i % C]);
}

// ------------------------------------------------------------------------------------------------ BatchNorm

// sums (parts, 2, C) of this block's part, from what each thread has found for the pack of channels in its lane
__device__ __forceinline__ void add_up(REAL (&s)[2 * V][256], const REAL* first, const REAL* second, int C, int lanes,
    int lane, REAL* sums)
{
    const int t = threadIdx.x;
    for (int v = 0; v < V; v++) s[v][t] = first[v], s[V + v][t] = second[v];
    __syncthreads();
    reduce(s, lanes);
    if (t < lanes && lane * V < C)
        for (int v = 0; v < V; v++) {
            sums[2 * blockIdx.y * C + lane * V + v] = s[v][t];
            sums[(2 * blockIdx.y + 1) * C + lane * V + v] = s[V + v][t];
        }
}

// For each channel and each of gridDim.y parts of the pixels: the sums of x - near and of (x - near)^2, near being the
// channel's first entry, so that nothing cancels. `lanes`, a power of two, packs of channels to a block.
extern "C" __global__ __launch_bounds__(256) void channel_sums(const TYPE* x, integer M, int C, int lanes, REAL* sums)
{
    __shared__ REAL s[2 * V][256];
    const int t = threadIdx.x, packs = C / V, lane = blockIdx.x * lanes + t % lanes, rows = 256 / lanes;
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
    add_up(s, first, second, C, lanes, lane, sums);
}

// The same for the gradient g behind the ReLU (0 where out = 0; out null: no ReLU): sums of g and of g (x - mean).
extern "C" __global__ __launch_bounds__(256) void gradient_sums(const TYPE* g, const TYPE* x, const TYPE* out,
    const REAL* mean, integer M, int C, int lanes, REAL* sums)
{
    __shared__ REAL s[2 * V][256];
    const int t = threadIdx.x, packs = C / V, lane = blockIdx.x * lanes + t % lanes, rows = 256 / lanes;
    REAL first[V], second[V], middle[V];
    for (int v = 0; v < V; v++) first[v] = second[v] = middle[v] = 0;
    if (lane < packs) {
        for (int v = 0; v < V; v++) middle[v] = mean[lane * V + v];
        for (integer i = blockIdx.y * rows + t / lanes; i < M; i += gridDim.y * rows) {
            const Pack pg = ((const Pack*)g)[i * packs + lane], px = ((const Pack*)x)[i * packs + lane];
            const Pack po = out ? ((const Pack*)out)[i * packs + lane] : pg;
            for (int v = 0; v < V; v++) {
                const REAL value = !out || get(po.at[v]) > 0 ? get(pg.at[v]) : (REAL)0;
                first[v] += value;
                second[v] += value * (get(px.at[v]) - middle[v]);
            }
        }
    }
    add_up(s, first, second, C, lanes, lane, sums);
}

// What follows adds those sums up for CHANNELS channels a block, by 32 threads each: s[0], s[1] [thread] is what a
// thread finds of the two sums of channel c.
#define CHANNELS 8
__device__ __forceinline__ void over_parts(const REAL* sums, int parts, int C, int c, double (&s)[2][256])
{
    double first = 0, second = 0;
    if (c < C)
        for (int i = threadIdx.x / CHANNELS; i < parts; i += 256 / CHANNELS) {
            first += sums[2 * i * C + c];
            second += sums[(2 * i + 1) * C + c];
        }
    s[0][threadIdx.x] = first, s[1][threadIdx.x] = second;
}

// saved (4, C): mean, 1 / deviation, and scale and shift of weight (x - mean) / deviation + bias, from the sums of
// `parts` parts, the running estimates moving towards them; without sums (null) from the running estimates.
extern "C" __global__ __launch_bounds__(256) void batch_statistics(const REAL* sums, int parts, const TYPE* x,
    integer M, int C, const REAL* weight, const REAL* bias, REAL* running_mean, REAL* running_var, double momentum,
    double eps, REAL* saved)
{
    __shared__ double s[2][256];
    const int t = threadIdx.x, c = blockIdx.x * CHANNELS + t % CHANNELS;
    over_parts(sums, sums ? parts : 0, C, c, s);
    __syncthreads();
    reduce(s, CHANNELS);
    if (t >= CHANNELS || c >= C) return;
    double mean = running_mean[c], var = running_var[c];
    if (sums) {
        const double d = s[0][t] / M;
        mean = get(x[c]) + d;
        var = fmax(s[1][t] / M - d * d, 0.0);
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

// dweight = sum g (x - mean) / deviation, dbias = sum g, and (3, C) a, b, c with dx = a g + b x + c:
// dx = weight / deviation (g - dbias / M - xhat dweight / M); with constant statistics weight / deviation g.
extern "C" __global__ __launch_bounds__(256) void gradient_statistics(const REAL* sums, int parts, integer M, int C,
    const REAL* saved, int training, REAL* dweight, REAL* dbias, REAL* terms)
{
    __shared__ double s[2][256];
    const int t = threadIdx.x, c = blockIdx.x * CHANNELS + t % CHANNELS;
    over_parts(sums, parts, C, c, s);
    __syncthreads();
    reduce(s, CHANNELS);
    if (t >= CHANNELS || c >= C) return;
    const double mean = saved[c], slope = saved[C + c], scale = saved[2 * C + c];
    const double dw = s[1][t] * slope, b = training ? -scale * dw * slope / M : 0;
    dweight[c] = dw;
    dbias[c] = s[0][t];
    terms[c] = scale;
    terms[C + c] = b;
    terms[2 * C + c] = training ? -scale * s[0][t] / M - b * mean : 0;
}

// dx = a g + b x + c with g behind the ReLU, which also goes to dadd unless that is null
extern "C" __global__ void normalize_gradient(const TYPE* g, const TYPE* x, const TYPE* out, const REAL* terms, int C,
    integer count, TYPE* dx, TYPE* dadd)
{
    EVERY(i, count) {
        const int c = (unsigned)i % (C / V) * V;
        const Pack pg = ((const Pack*)g)[i], px = ((const Pack*)x)[i], po = out ? ((const Pack*)out)[i] : pg;
        Pack d, masked;
        for (int v = 0; v < V; v++) {
            const REAL value = !out || get(po.at[v]) > 0 ? get(pg.at[v]) : (REAL)0;
            set(masked.at[v], value);
            set(d.at[v], terms[c + v] * value + terms[C + c + v] * get(px.at[v]) + terms[2 * C + c + v]);
        }
        ((Pack*)dx)[i] = d;
        if (dadd) ((Pack*)dadd)[i] = masked;
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
// 64 x 64 of c, each thread 4 x 4, while what it needs next is on its way from memory.
extern "C" __global__ __launch_bounds__(256) void product(const REAL* a, const REAL* b, const REAL* bias, REAL* c,
    int M, int N, int K, integer a_row, integer a_column, integer b_row, integer b_column)
{
    __shared__ REAL as[16][65], bs[16][65];  // 65: threads that store a column of them use different banks
    const int t = threadIdx.x, top = blockIdx.y * 64, left = blockIdx.x * 64, row = t / 16, column = t % 16;
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
            next_a[i] = m < M && k < K ? a[m * a_row + k * a_column] : (REAL)0;
            k = first + row_b(e);
            next_b[i] = n < N && k < K ? b[k * b_row + n * b_column] : (REAL)0;
        }
    };
    for (int i = 0; i < 16; i++) sum[i / 4][i % 4] = 0;
    load(0);
    for (int first = 0; first < K; first += 16) {
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
    for (int i = 0; i < 16; i++) {
        const int m = top + row + i / 4 * 16, n = left + column + i % 4 * 16;
        if (m < M && n < N) c[(integer)m * N + n] = sum[i / 4][i % 4] + (bias ? bias[n] : (REAL)0);
    }
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
        const int label = labels[n];
        int top = 0;
        for (int k = 1; k < K; k++)
            if (z[k] > z[top]) top = k;
        REAL sum = 0;
        for (int k = 0; k < K; k++) sum += exp(z[k] - z[top]);
        total += log(sum) - (z[label] - z[top]);
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

struct Part {  // a parameter: values, velocity (null without momentum), gradient, which entries are kept (null: all)
    REAL *w, *v;
    const REAL* g;
    const unsigned char* mask;
    integer size;
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
        const REAL w = p.w[i];
        REAL g = p.g[i] + decay * w;
        if (p.v) {
            const REAL v = p.v[i] = mu * p.v[i] + g;
            g = nesterov ? g + mu * v : v;
        }
        p.w[i] = w - lr * g;
    }
}
