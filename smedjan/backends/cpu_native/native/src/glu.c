/* y = act(gate) * up, act(gate) rounded to gate's dtype first. */
#include "tape.h"
#include "vector.h"

enum { SILU, GELU, GELU_TANH, RELU, RELU2 };

ALWAYS float silu(float x) { return x / (1.0f + exp_fast(-x)); }
ALWAYS float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
ALWAYS float gelu_tanh(float x)
{
    /* 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)) */
    return x / (1.0f + exp_fast(-2.0f * 0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
ALWAYS float relu(float x) { return x < 0.0f ? 0.0f : x; }
ALWAYS float relu2(float x) { return relu(x) * relu(x); }

#define LOOP(act, f)                                                                                                   \
    for (int64_t i = from; i < to; i++)                                                                                \
        y[i] = put_##act(get_##act(put_##act(f(get_##act(gate[i])))) * get_##act(up[i]));

/* arrays: gate, up, y.  numbers: count, which activation */
#define DEFINE_GLU(act)                                                                                                \
    void glu_##act(const step *s, int rank, int threads)                                                               \
    {                                                                                                                  \
        const act##_t *gate = s->array[0], *up = s->array[1];                                                          \
        act##_t *y = s->array[2];                                                                                      \
        int64_t from, to;                                                                                              \
        share(s->number[0], 64, rank, threads, &from, &to);                                                            \
        switch (s->number[1]) {                                                                                        \
        case SILU: LOOP(act, silu) break;                                                                              \
        case GELU: LOOP(act, gelu) break;                                                                              \
        case GELU_TANH: LOOP(act, gelu_tanh) break;                                                                    \
        case RELU: LOOP(act, relu) break;                                                                              \
        case RELU2: LOOP(act, relu2) break;                                                                            \
        }                                                                                                              \
    }

DEFINE_GLU(float32)
DEFINE_GLU(bfloat16)
