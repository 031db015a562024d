// YUV, grey or Bayer samples, wherever they lie in up to three memory planes, become words of red, green and blue: cropped, scaled
// (bilinear), in the colours that their encoding and range mean. `convert/job.rs` fills `Job` in and has checked that every word in which
// there is a sample, and every word that is written, lies inside its memory.

struct Job {
    // Byte of the first sample: of Y, U and V, or of the only plane. Kind of the source.
    start: vec4<u32>,
    // Bytes between rows of each. Bit 0: columns are not scaled, bit 1: rows are not.
    stride: vec4<u32>,
    // Bytes between samples in a row of each. Bits of a sample, and from bit 16 on how far they are shifted up.
    step: vec4<u32>,
    // Width and height in pixels. YUV: how far x and y are shifted down for chroma. Bayer: column and row of red in the square.
    size: vec4<u32>,
    // First column and row, columns and rows that are shown.
    crop: vec4<f32>,
    // What V adds to red, V and U to green, U to blue.
    chroma: vec4<f32>,
    // Black, one step of luma or of a Bayer sample, the middle of chroma; words are of red first.
    levels: vec4<f32>,
    // First word, words between rows, width and height in pixels.
    canvas: vec4<u32>,
}

const YUV = 0u;
const GREY = 1u;

var<immediate> job: Job;

// The memory of Y, or of the only plane; of U; of V. It may be one for all.
@group(0) @binding(0) var<storage, read> first: array<u32>;
@group(0) @binding(1) var<storage, read> second: array<u32>;
@group(0) @binding(2) var<storage, read> third: array<u32>;
@group(0) @binding(3) var<storage, read_write> words: array<u32>;

fn byte_of(plane: u32, x: i32, y: i32) -> u32 {
    return job.start[plane] + u32(y) * job.stride[plane] + u32(x) * job.step[plane];
}

// Samples of two bytes lie at even places, so that none lies in two words.
fn sample(word: u32, at: u32) -> f32 {
    return f32(extractBits(word, 8u * (at & 3u) + (job.step.w >> 16u), job.step.w & 0xffffu));
}

fn raw(x: i32, y: i32) -> f32 {
    let at = byte_of(0u, x, y);
    return sample(first[at >> 2u], at);
}

fn of_yuv(x: i32, y: i32) -> vec3<f32> {
    let luma = vec3<f32>((raw(x, y) - job.levels.x) * job.levels.y);
    if job.start.w == GREY {
        return luma;
    }
    let column = x >> job.size.z;
    let row = y >> job.size.w;
    let at_u = byte_of(1u, column, row);
    let at_v = byte_of(2u, column, row);
    let u = sample(second[at_u >> 2u], at_u) - job.levels.z;
    let v = sample(third[at_v >> 2u], at_v) - job.levels.z;
    return luma + vec3<f32>(job.chroma.x * v, job.chroma.y * v + job.chroma.z * u, job.chroma.w * u);
}

// Mirrored at the edges, where the colours of the filters are as they would be outside. In a picture that is narrower than half of the
// filter that would be outside again: the first stands for it.
fn mirrored(at: i32, size: u32) -> i32 {
    let last = i32(size) - 1;
    return max(last - abs(last - abs(at)), 0);
}

fn around(x: i32, y: i32) -> f32 {
    return raw(mirrored(x, job.size.x), mirrored(y, job.size.y));
}

// After H. Malvar, L. He, R. Cutler, "High-quality linear interpolation for demosaicing of Bayer-patterned color images" (ICASSP
// 2004), figure 2: what is missing is the mean of its neighbours, corrected by how the pixel's own colour bends there.
fn of_bayer(x: i32, y: i32) -> vec3<f32> {
    let own = raw(x, y);
    let beside = around(x - 1, y) + around(x + 1, y);
    let above = around(x, y - 1) + around(x, y + 1);
    let across = around(x - 2, y) + around(x + 2, y);
    let along = around(x, y - 2) + around(x, y + 2);
    let corners = around(x - 1, y - 1) + around(x + 1, y - 1) + around(x - 1, y + 1) + around(x + 1, y + 1);
    let odd = (vec2<u32>(u32(x), u32(y)) ^ job.size.zw) & vec2<u32>(1u);
    let green = (4.0 * own + 2.0 * (beside + above) - across - along) / 8.0;
    let opposite = (6.0 * own + 2.0 * corners - 1.5 * (across + along)) / 8.0;
    // At green: of the colour left and right of it, and of the colour above and below.
    let horizontal = (5.0 * own + 4.0 * beside - corners - across + 0.5 * along) / 8.0;
    let vertical = (5.0 * own + 4.0 * above - corners - along + 0.5 * across) / 8.0;
    var colour: vec3<f32>;
    if odd.x == odd.y {
        colour = select(vec3<f32>(own, green, opposite), vec3<f32>(opposite, green, own), odd.x == 1u);
    } else {
        colour = select(vec3<f32>(vertical, own, horizontal), vec3<f32>(horizontal, own, vertical), odd.x == 1u);
    }
    return colour * job.levels.y;
}

fn colour(at: vec2<i32>) -> vec3<f32> {
    var found: vec3<f32>;
    if job.start.w <= GREY {
        found = of_yuv(at.x, at.y);
    } else {
        found = of_bayer(at.x, at.y);
    }
    return clamp(found, vec3<f32>(0.0), vec3<f32>(1.0));
}

@compute @workgroup_size(16, 4)
fn convert(@builtin(global_invocation_id) at: vec3<u32>) {
    if any(at.xy >= job.canvas.zw) {
        return;
    }
    // Exactly 1 where it is: the quotient of equal numbers may be a little more or less.
    let unscaled = (vec2<u32>(job.stride.w) & vec2<u32>(1u, 2u)) != vec2<u32>(0u);
    let scale = select(job.crop.zw / vec2<f32>(job.canvas.zw), vec2<f32>(1.0), unscaled);
    let place = job.crop.xy + (vec2<f32>(at.xy) + 0.5) * scale - 0.5;
    let corner = floor(place);
    let part = place - corner;
    let low = vec2<i32>(job.crop.xy);
    let high = vec2<i32>(job.crop.xy + job.crop.zw) - 1;
    // Of the four pixels around the place each has a share. Unscaled the first has all of it, and no other is looked at. A loop, with a
    // count that a compiler does not know: what is in it is compiled once, and not four times.
    let pixels = select(1u, 4u, any(part != vec2<f32>(0.0)));
    var result = vec3<f32>(0.0);
    for (var pixel = 0u; pixel < pixels; pixel += 1u) {
        let beyond = vec2<u32>(pixel & 1u, pixel >> 1u);
        let share = select(1.0 - part, part, beyond == vec2<u32>(1u));
        let near = clamp(vec2<i32>(corner) + vec2<i32>(beyond), low, high);
        result += share.x * share.y * colour(near);
    }
    let red_first = job.levels.w != 0.0;
    let bytes = select(result.zyx, result, red_first);
    words[job.canvas.x + at.y * job.canvas.y + at.x] = pack4x8unorm(vec4<f32>(bytes, 1.0));
}
