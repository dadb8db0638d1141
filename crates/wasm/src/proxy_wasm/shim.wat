;; Between a guest and those functions of the host that hand data over. The ABI has the host ask the guest for memory in the
;; middle of such a function. Here the host only says how much; asking is the guest's own calling of itself, on its own stack.
;;
;; Each function of "host" answers with a status, or, negative, with the number of bytes that it has for the guest.
;; Built to shim.wasm, which a test compares with this.
(module
  (type $allocate (func (param i32) (result i32)))
  (import "host" "deliver" (func $deliver (param i32) (result i32)))
  (import "host" "proxy_get_configuration" (func $configuration (param i32 i32) (result i32)))
  (import "host" "proxy_get_header_map_pairs" (func $pairs (param i32 i32 i32) (result i32)))
  (import "host" "proxy_dequeue_shared_queue" (func $dequeue (param i32 i32 i32) (result i32)))
  (import "host" "proxy_get_status" (func $status (param i32 i32 i32) (result i32)))
  (import "host" "proxy_get_property" (func $property (param i32 i32 i32 i32) (result i32)))
  (import "host" "proxy_get_header_map_value" (func $value (param i32 i32 i32 i32 i32) (result i32)))
  (import "host" "proxy_get_buffer_bytes" (func $buffer (param i32 i32 i32 i32 i32) (result i32)))
  (import "host" "proxy_get_shared_data" (func $shared (param i32 i32 i32 i32 i32) (result i32)))
  ;; The guest's own way to get memory.
  (table (export "allocate") 1 1 funcref)
  (func $finish (param $answer i32) (result i32)
    (if (i32.ge_s (local.get $answer) (i32.const 0)) (then (return (local.get $answer))))
    (call $deliver
      (call_indirect (type $allocate) (i32.sub (i32.const 0) (local.get $answer)) (i32.const 0))))
  (func (export "proxy_get_configuration") (param i32 i32) (result i32)
    (call $finish (call $configuration (local.get 0) (local.get 1))))
  (func (export "proxy_get_header_map_pairs") (param i32 i32 i32) (result i32)
    (call $finish (call $pairs (local.get 0) (local.get 1) (local.get 2))))
  (func (export "proxy_dequeue_shared_queue") (param i32 i32 i32) (result i32)
    (call $finish (call $dequeue (local.get 0) (local.get 1) (local.get 2))))
  (func (export "proxy_get_status") (param i32 i32 i32) (result i32)
    (call $finish (call $status (local.get 0) (local.get 1) (local.get 2))))
  (func (export "proxy_get_property") (param i32 i32 i32 i32) (result i32)
    (call $finish (call $property (local.get 0) (local.get 1) (local.get 2) (local.get 3))))
  (func (export "proxy_get_header_map_value") (param i32 i32 i32 i32 i32) (result i32)
    (call $finish
      (call $value (local.get 0) (local.get 1) (local.get 2) (local.get 3) (local.get 4))))
  (func (export "proxy_get_buffer_bytes") (param i32 i32 i32 i32 i32) (result i32)
    (call $finish
      (call $buffer (local.get 0) (local.get 1) (local.get 2) (local.get 3) (local.get 4))))
  (func (export "proxy_get_shared_data") (param i32 i32 i32 i32 i32) (result i32)
    (call $finish
      (call $shared (local.get 0) (local.get 1) (local.get 2) (local.get 3) (local.get 4)))))
