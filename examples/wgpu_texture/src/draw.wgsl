// The camera's picture, turned and made smaller, on a grey ground.

@group(0) @binding(0) var camera: texture_2d<f32>;
@group(0) @binding(1) var nearest: sampler;

const CANVAS: vec2<f32> = vec2<f32>(640.0, 480.0);

// One triangle that covers the canvas.
@vertex
fn cover(@builtin(vertex_index) corner: u32) -> @builtin(position) vec4<f32> {
    let place = vec2<f32>(f32(corner & 1u), f32(corner >> 1u)) * 4.0 - 1.0;
    return vec4<f32>(place, 0.0, 1.0);
}

@fragment
fn draw(@builtin(position) at: vec4<f32>) -> @location(0) vec4<f32> {
    let picture = vec2<f32>(textureDimensions(camera));
    let fit = min(CANVAS.x / picture.x, CANVAS.y / picture.y) * 0.75;
    let from_centre = (at.xy - CANVAS / 2.0) / fit;
    // By a sixth of a right angle.
    let turn = vec2<f32>(cos(0.2618), sin(0.2618));
    let turned = vec2<f32>(dot(from_centre, turn), dot(from_centre, vec2<f32>(-turn.y, turn.x)));
    let place = turned / picture + 0.5;
    if any(place < vec2<f32>(0.0)) || any(place > vec2<f32>(1.0)) {
        return vec4<f32>(0.2, 0.2, 0.2, 1.0);
    }
    return vec4<f32>(textureSampleLevel(camera, nearest, place, 0.0).rgb, 1.0);
}
