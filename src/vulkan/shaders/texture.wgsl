// For examples/vulkan_texture.rs: a camera's picture as a texture, turned and made smaller, on a grey ground.

struct Canvas {
    size: vec2<u32>,
}

var<immediate> canvas: Canvas;

@group(0) @binding(0) var camera: texture_2d<f32>;
@group(0) @binding(1) var nearest: sampler;
@group(0) @binding(2) var<storage, read_write> pixels: array<u32>;

@compute @workgroup_size(8, 8)
fn draw(@builtin(global_invocation_id) at: vec3<u32>) {
    if any(at.xy >= canvas.size) {
        return;
    }
    let picture = vec2<f32>(textureDimensions(camera));
    let fit = min(f32(canvas.size.x) / picture.x, f32(canvas.size.y) / picture.y) * 0.75;
    let from_centre = (vec2<f32>(at.xy) + 0.5 - vec2<f32>(canvas.size) / 2.0) / fit;
    // By a sixth of a right angle.
    let turn = vec2<f32>(cos(0.2618), sin(0.2618));
    let turned = vec2<f32>(dot(from_centre, turn), dot(from_centre, vec2<f32>(-turn.y, turn.x)));
    let place = turned / picture + 0.5;
    var colour = vec4<f32>(0.2, 0.2, 0.2, 1.0);
    if all(place >= vec2<f32>(0.0)) && all(place <= vec2<f32>(1.0)) {
        colour = textureSampleLevel(camera, nearest, place, 0.0);
    }
    pixels[at.y * canvas.size.x + at.x] = pack4x8unorm(colour);
}
