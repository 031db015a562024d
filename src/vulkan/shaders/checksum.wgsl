// Sums up a hash of every texel of one colour plane. `checksum.rs` does the same on the CPU: what is changed here is changed there.

struct Plane {
    // The integer that 1.0 stands for in each channel; 0 for a channel that is not there or means nothing.
    levels: vec4<f32>,
    // Tells the planes of a picture apart.
    salt: u32,
}

var<immediate> plane: Plane;

@group(0) @binding(0) var texels: texture_2d<f32>;
@group(0) @binding(1) var<storage, read_write> total: atomic<u32>;

var<workgroup> of_row: atomic<u32>;

fn mix(value: u32) -> u32 {
    var hash = value;
    hash = (hash ^ (hash >> 16u)) * 0x7feb352du;
    hash = (hash ^ (hash >> 15u)) * 0x846ca68bu;
    return hash ^ (hash >> 16u);
}

// One workgroup a row.
@compute @workgroup_size(64)
fn checksum(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let size = textureDimensions(texels);
    let y = group.x;
    var sum = 0u;
    for (var x = local.x; x < size.x; x += 64u) {
        // Read as it lies in memory: no filter, no conversion but that of the integer n to n / level, which rounding undoes.
        let texel = vec4<u32>(round(textureLoad(texels, vec2<u32>(x, y), 0) * plane.levels));
        let place = mix(y * size.x + x + plane.salt);
        sum += mix(mix(place ^ (texel.r | (texel.g << 16u))) ^ (texel.b | (texel.a << 16u)));
    }
    atomicAdd(&of_row, sum);
    workgroupBarrier();
    if local.x == 0u {
        atomicAdd(&total, atomicLoad(&of_row));
    }
}
